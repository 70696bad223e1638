"""What `tools/bench_files.py` counts and measures, on numbers that can be checked by hand."""

from __future__ import annotations

import bench_files
import file_samples
import numpy as np
import pytest


def test_sqnr_is_ten_decibels_where_the_noise_has_a_tenth_of_the_energy():
    assert bench_files.sqnr(np.full(8, np.sqrt(10)), np.full(8, np.sqrt(10) + 1)) == pytest.approx(10)


def test_outputs_that_are_no_numbers_have_the_least_sqnr():
    assert bench_files.sqnr(np.ones(4), np.full(4, np.nan)) == -200


def test_a_part_that_is_lost_is_seen_beside_a_whole_that_is_not():
    file = bench_files.File("x.onnx", bench_files.heads, parts={"out": {"boxes": (1, 0, 4), "scores": (1, 4, 6)}})
    wanted = np.concatenate([np.full((2, 4, 9), 300.0), np.full((2, 2, 9), 0.5)], 1)
    made = wanted.copy()
    made[:, 4:] = 0
    found = bench_files.by_part(file, {"out": wanted}, {"out": made})
    assert found["out"] > 50 and found["out:boxes"] == 200 and found["out:scores"] == pytest.approx(0)


def test_of_two_boxes_that_overlap_the_better_one_is_kept_within_a_class():
    corners = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [1, 0, 11, 10], [50, 50, 60, 60]], float)
    _, scores, classes = file_samples.kept(corners, np.array([0.6, 0.9, 0.8, 0.2]), np.array([0, 0, 1, 0]))
    assert scores.tolist() == [0.9, 0.8] and classes.tolist() == [0, 1]


def test_a_detection_is_found_once_and_what_is_left_is_new():
    one, two = np.array([[0, 0, 10, 10]], float), np.array([[0, 0, 10, 10], [0, 0, 10, 9]], float)
    wanted, made = (one, np.ones(1), np.zeros(1, int)), (two, np.ones(2), np.zeros(2, int))
    assert file_samples.matched([wanted], [made]) == {"wanted": 1, "found": 1, "new": 1}
    assert file_samples.matched([made], [wanted]) == {"wanted": 2, "found": 1, "new": 0}


def test_a_detection_of_another_class_is_lost_and_new():
    box = np.array([[0, 0, 10, 10]], float)
    found = file_samples.matched([(box, np.ones(1), np.zeros(1, int))], [(box, np.ones(1), np.ones(1, int))])
    assert found == {"wanted": 1, "found": 0, "new": 1}


def test_boxes_of_a_grid_stand_where_its_cells_are():
    made = np.zeros((1, 3549, 6), np.float32)
    made[0, 52 * 52 + 27, 4:] = 1  # the second row and column of the grid with 26 cells a side, of 16 pixels each
    ((corners, scores, _),) = file_samples.yolox([made])
    assert corners.tolist() == [[8, 8, 24, 24]] and scores.tolist() == [1]


def test_sounds_and_lines_of_two_seeds_differ_and_those_of_one_are_the_same():
    first, same, other = (file_samples.speech(2, 4000, 16000, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, same) and not np.array_equal(first, other) and abs(first).max() <= 1
    lines = [file_samples.lines(2, 32, 96, seed) for seed in (1, 1, 2)]
    assert np.array_equal(lines[0], lines[1]) and not np.array_equal(lines[0], lines[2])
