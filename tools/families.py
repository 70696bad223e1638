"""The model families that `coverage.py` runs: how to make one with random weights and small inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TORCHVISION = torch.library.Library("torchvision", "DEF")
"""The two ops that torchvision's own library would bring, which is built for another torch; it must stay alive."""
for _op in ("nms", "qnms"):
    TORCHVISION.define(f"{_op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture: `make` gives the module, `inputs(batch, seed)` its inputs."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], tuple[Tensor, ...]]
    kind: Literal["vision", "transformer"]
    recipe: str = "plain"


def images(size: int, channels: int = 3) -> Callable[[int, int], tuple[Tensor, ...]]:
    """Batches of random images: coarse patterns of various contrast under noise.

    Of noise alone every image has the same mean features, and batch norms then blow up what little differs.
    """

    def make(batch: int, seed: int) -> tuple[Tensor, ...]:
        random = torch.Generator().manual_seed(seed)
        coarse = F.interpolate(torch.randn(batch, channels, 4, 4, generator=random), size=(size, size), mode="bicubic")
        contrast = 0.5 + 2 * torch.rand(batch, 1, 1, 1, generator=random)
        return (contrast * coarse + 0.3 * torch.randn(batch, channels, size, size, generator=random),)

    return make


def tokens(length: int, vocabulary: int, mask: bool = True) -> Callable[[int, int], tuple[Tensor, ...]]:
    """Batches of random token ids, with a mask that hides the end of every other sequence."""

    def make(batch: int, seed: int) -> tuple[Tensor, ...]:
        ids = torch.randint(5, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))
        seen = torch.ones_like(ids)
        seen[1::2, length // 2 :] = 0
        return (ids, seen) if mask else (ids,)

    return make


def _torchvision(name: str, **options: Any) -> nn.Module:
    import torchvision.models as models

    module: nn.Module = models.get_model(name, weights=None, **options)
    return module


class Scores(nn.Module):
    """The tensor of a segmentation model that returns a dictionary of them."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.inner(x)["out"]
        return made


class Heads(nn.Module):
    """The scores and boxes of a detector at all places, before any is chosen."""

    def __init__(self, name: str):
        import torchvision.models.detection as models

        super().__init__()
        made = getattr(models, name)(weights=None, weights_backbone=None)
        self.backbone, self.head = made.backbone, made.head

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.head(list(self.backbone(x).values()))
        return found


def _timm(name: str, **options: Any) -> nn.Module:
    import timm

    module: nn.Module = timm.create_model(name, pretrained=False, **options)
    return module


class UNet(nn.Module):
    """An encoder and a decoder with skips: transposed convolutions, concats, bilinear resizing."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.one, self.two, self.three = self._pair(3, width), self._pair(width, 2 * width), self._pair(2 * width, 4 * width)
        self.up = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.four, self.five = self._pair(4 * width, 2 * width), self._pair(3 * width, width)
        self.head = nn.Conv2d(width, 4, 1)

    @staticmethod
    def _pair(inner: int, outer: int) -> nn.Sequential:
        layers = [nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers, nn.Conv2d(outer, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer), nn.LeakyReLU(0.1))

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        two = self.two(F.max_pool2d(one, 2))
        x = self.up(self.three(F.max_pool2d(two, 2)))
        x = self.four(torch.cat([x, two], 1))
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.head(self.five(torch.cat([x, one], 1)))


_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_WORDS = {"vocab_size": 200}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _hf(config: str, model: str, **options: Any) -> nn.Module:
    import transformers as hf

    module: nn.Module = getattr(hf, model)(getattr(hf, config)(**options))
    return module


class Encoder(nn.Module):
    """The encoder of a model alone."""

    def __init__(self, make: Callable[[], nn.Module]):
        super().__init__()
        self.inner = make().get_encoder()  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.inner(x).last_hidden_state
        return made


def _vision(make: Callable[[], nn.Module], size: int) -> Family:
    return Family(make=make, inputs=images(size), kind="vision")


def _transformer(name: str, head: str, inputs: Callable[[int, int], tuple[Tensor, ...]], **options: Any) -> Family:
    return Family(make=partial(_hf, f"{name}Config", f"{name}{head}", **options), inputs=inputs, kind="transformer")


_TORCHVISION_SIZES = {
    **dict.fromkeys(("resnet18", "resnext50_32x4d", "regnet_y_400mf", "regnet_x_400mf", "mobilenet_v2", "mobilenet_v3_small"), 64),
    **dict.fromkeys(("efficientnet_b0", "efficientnet_v2_s", "shufflenet_v2_x0_5", "squeezenet1_1", "densenet121", "mnasnet0_5"), 64),
    **dict.fromkeys(("convnext_tiny", "swin_t", "vgg11_bn", "alexnet", "googlenet"), 64),
    "inception_v3": 96,
}
_TIMM = {
    **dict.fromkeys(("resnet26d", "seresnext26d_32x4d", "resnest14d", "regnetx_002", "regnety_002", "mobilenetv1_100"), 64),
    **dict.fromkeys(("mobilenetv2_050", "mobilenetv3_large_100", "mobilenetv4_conv_small", "mobilenetv4_hybrid_medium"), 64),
    **dict.fromkeys(("efficientnet_lite0", "tf_efficientnetv2_b0", "fbnetc_100", "mixnet_s", "lcnet_050", "tinynet_e"), 64),
    **dict.fromkeys(("ghostnet_050", "ghostnetv2_100", "dla34", "dpn48b", "hrnet_w18_small", "repvgg_a0", "mobileone_s0"), 64),
    **dict.fromkeys(("convnext_atto", "convnextv2_atto", "mobilevit_xxs", "mobilevitv2_050", "edgenext_xx_small"), 64),
    **dict.fromkeys(("cspresnet50", "cspdarknet53", "ese_vovnet19b_dw", "selecsls42", "rexnet_100", "hardcorenas_a"), 64),
    **dict.fromkeys(("poolformer_s12", "efficientvit_b0", "repvit_m0_9", "inception_next_tiny", "fastvit_t8", "starnet_s1"), 64),
    **dict.fromkeys(("efficientformer_l1", "efficientformerv2_s0", "levit_128s", "pit_ti_224", "tiny_vit_5m_224"), 224),
}
_SIZED = {
    "vit_tiny_patch16_224": {"img_size": 64},
    "deit_tiny_patch16_224": {"img_size": 64},
    "mixer_s32_224": {"img_size": 64},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "window_size": 7},
}

FAMILIES: dict[str, Family] = {
    **{name: _vision(partial(_torchvision, name), size) for name, size in _TORCHVISION_SIZES.items()},
    **{f"timm/{name}": _vision(partial(_timm, name), size) for name, size in _TIMM.items()},
    **{f"timm/{name}": _vision(partial(_timm, name, **options), options["img_size"]) for name, options in _SIZED.items()},
    "deeplabv3_mobilenet": _vision(lambda: Scores(_torchvision("deeplabv3_mobilenet_v3_large", weights_backbone=None)), 64),
    "lraspp_mobilenet": _vision(lambda: Scores(_torchvision("lraspp_mobilenet_v3_large", weights_backbone=None)), 64),
    "unet": _vision(UNet, 64),
    "ssdlite_mobilenet": _vision(partial(Heads, "ssdlite320_mobilenet_v3_large"), 96),
    "retinanet": _vision(partial(Heads, "retinanet_resnet50_fpn"), 64),
    "fcos": _vision(partial(Heads, "fcos_resnet50_fpn"), 64),
    **{
        f"hf/{name.lower()}": _transformer(name, "ForSequenceClassification", tokens(16, 200), **_SMALL, **_WORDS)
        for name in ("Bert", "Roberta", "Electra")
    },
    "hf/distilbert": _transformer(
        "DistilBert", "ForSequenceClassification", tokens(16, 200), dim=64, n_layers=2, n_heads=4, hidden_dim=128, **_WORDS
    ),
    "hf/vit": _transformer("ViT", "ForImageClassification", images(32), **_SMALL, image_size=32, patch_size=8),
    "hf/gpt2": _transformer(
        "GPT2", "LMHeadModel", tokens(16, 200, mask=False), n_embd=64, n_layer=2, n_head=4, **_WORDS, n_positions=64, use_cache=False
    ),
    "hf/llama": _transformer(
        "Llama", "ForCausalLM", tokens(16, 200, mask=False), **_SMALL, **_WORDS, num_key_value_heads=2, use_cache=False
    ),
    "hf/whisper_encoder": Family(
        make=partial(
            Encoder,
            partial(
                _hf,
                "WhisperConfig",
                "WhisperModel",
                d_model=64,
                encoder_layers=2,
                encoder_attention_heads=4,
                encoder_ffn_dim=128,
                decoder_layers=1,
                decoder_attention_heads=4,
                decoder_ffn_dim=128,
                max_source_positions=32,
                **_WORDS,
                num_mel_bins=20,
                **_ENDS,
                decoder_start_token_id=1,
            ),
        ),
        inputs=lambda batch, seed: (torch.randn(batch, 20, 64, generator=torch.Generator().manual_seed(seed)),),
        kind="transformer",
    ),
    "hf/wav2vec2": _transformer(
        "Wav2Vec2",
        "ForCTC",
        lambda batch, seed: (torch.randn(batch, 1600, generator=torch.Generator().manual_seed(seed)),),
        **_SMALL,
        conv_dim=(32, 32),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        vocab_size=32,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    ),
    "hf/segformer": _transformer(
        "Segformer",
        "ForSemanticSegmentation",
        images(64),
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 32, 40, 64],
        decoder_hidden_size=64,
    ),
    "hf/clip_text": _transformer(
        "CLIPText",
        "Model",
        tokens(16, 200, mask=False),
        **_SMALL,
        **_WORDS,
        max_position_embeddings=32,
        eos_token_id=2,
        projection_dim=32,
    ),
    "hf/modernbert": _transformer(
        "ModernBert",
        "ForSequenceClassification",
        tokens(16, 200),
        **_SMALL,
        **_WORDS,
        **_ENDS,
        cls_token_id=1,
        sep_token_id=2,
    ),
    "hf/deberta": _transformer(
        "DebertaV2",
        "ForSequenceClassification",
        tokens(16, 200),
        **_SMALL,
        **_WORDS,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
    ),
    "hf/t5_encoder": _transformer(
        "T5", "EncoderModel", tokens(16, 200), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, **_WORDS
    ),
    "hf/gemma2": _transformer(
        "Gemma2", "ForCausalLM", tokens(16, 200), **_SMALL, **_WORDS, num_key_value_heads=2, head_dim=16, use_cache=False
    ),
    "hf/qwen2": _transformer("Qwen2", "ForCausalLM", tokens(16, 200), **_SMALL, **_WORDS, num_key_value_heads=2, use_cache=False),
    "hf/dinov2": _transformer("Dinov2", "Model", images(64), **_SMALL, image_size=64, patch_size=16),
    "hf/yolos": _transformer(
        "Yolos", "ForObjectDetection", images(64), **_SMALL, image_size=[64, 64], patch_size=16, num_detection_tokens=10
    ),
    "hf/detr": _transformer(
        "Detr",
        "ForObjectDetection",
        images(64),
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_queries=10,
        use_pretrained_backbone=False,
        backbone="resnet18",
    ),
    "hf/dpt": _transformer(
        "DPT",
        "ForDepthEstimation",
        images(64),
        **_SMALL | {"num_hidden_layers": 4},
        image_size=64,
        patch_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 32, 64, 64],
        fusion_hidden_size=32,
    ),
}
