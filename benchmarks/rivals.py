"""FastFlow and PatchCore as anomalib builds them, on the same weights and images as ours; speed.py and shift.py
call this.

pip install anomalib FrEIA && python benchmarks/rivals.py patchcore mvtec/bottle --weights resnet18.pth

The models run at 256x256 with ResNet18, in float32 as published. Only the model is timed, without the framework's loop
around it."""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.speed import SIZE, milliseconds_of, tests_auroc  # noqa: E402
from kit import data, folders  # noqa: E402
from kit.backbone import DEVIATION, MEAN  # noqa: E402
from kit.good import split  # noqa: E402

try:
    from anomalib.models.image.fastflow.loss import FastflowLoss
    from anomalib.models.image.fastflow.torch_model import FastflowModel
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel
except ImportError:
    sys.exit("error: pip install anomalib FrEIA first")

EPOCHS = 20  # of the flow. anomalib itself trains until its validation metrics no longer rise
TRAINING_BATCH = 32  # of the flow's training, anomalib's default
BANK = 2000  # vectors


def normalized(images: Tensor) -> Tensor:
    return (images - MEAN.to(images.device)) / DEVIATION.to(images.device)


def train_fastflow(files: list[Path], weights: dict, device: str) -> nn.Module:
    model = FastflowModel((SIZE, SIZE), "resnet18", pre_trained=False).to(device)
    model.feature_extractor.load_state_dict(weights, strict=False)
    loss_of = FastflowLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001, weight_decay=0.00001)
    images = normalized(torch.cat(list(data.batches(files, (SIZE, SIZE)))).to(device))
    model.train()
    for epoch in range(EPOCHS):
        for chosen in torch.randperm(len(images)).split(TRAINING_BATCH):
            loss = loss_of(*model(images[chosen]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: {loss.item():.0f}", file=sys.stderr)
    return model


@torch.no_grad()
def train_patchcore(files: list[Path], weights: dict, device: str) -> nn.Module:
    model = PatchcoreModel(("layer2", "layer3"), "resnet18", pre_trained=False).to(device)
    model.feature_extractor.feature_extractor.load_state_dict(weights, strict=False)
    model.train()
    for images in data.batches(files, (SIZE, SIZE)):
        model(normalized(images.to(device)))
    model.subsample_embedding(BANK / (len(files) * math.ceil(SIZE / 8) ** 2))
    return model


TRAIN: dict[str, Callable] = {"patchcore": train_patchcore, "fastflow": train_fastflow}


def trained(name: str, files: list[Path], weights: str, device: str) -> nn.Module:
    """A model that was trained on these good images, ready to judge. `weights`: a file of the backbone's weights."""
    torch.manual_seed(0)
    return TRAIN[name](files, torch.load(weights, weights_only=True), device).eval()


def scores_of(model: nn.Module, images: Tensor, device: str) -> Tensor:
    """The scores (B,) of images (B, 3, SIZE, SIZE) in [0, 1]."""
    return model(normalized(images.to(device))).pred_score.flatten()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=TRAIN)
    parser.add_argument("category", type=Path)
    parser.add_argument("--weights", required=True, help="file with ResNet18's ImageNet weights")
    parser.add_argument("--batch", type=int, default=8, help="batch size for judging, in images (default: 8)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    _, files = split(folders.list_images(folders.good_folder(args.category)), seed=0)
    started = time.perf_counter()
    model = trained(args.model, files, args.weights, args.device)
    seconds = time.perf_counter() - started

    def scores(images: Tensor) -> Tensor:
        return scores_of(model, images, args.device)

    def backbone(images: Tensor) -> object:
        return model.feature_extractor(normalized(images.to(args.device)))

    with torch.no_grad():
        found = {
            "seconds": seconds,
            "image_auroc": tests_auroc(scores, args.category, (SIZE, SIZE)),
            "megabytes": sum(p.numel() * p.element_size() for p in model.state_dict().values()) / 1e6,
        }
    found |= milliseconds_of(scores, backbone, args.category, (SIZE, SIZE), args.batch, args.device)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
