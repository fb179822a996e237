"""The command lines of train.py and evaluate.py: their options, and what contradicts what. No PyTorch here: its import
takes seconds, and neither --help nor a wrong command line need wait for it (but the name of a backbone, which only
PyTorch's models can tell)."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from kit.errors import InputError
from kit.settings import FALSE_ALARM, OPTIONS
from kit.shapes import check_size, parsed_size

RANGES = {
    "seed": (0, 2**31),
    "seeds": (1, 99),
    "epochs": (1, 9999),
    "batch": (1, 1_000_000),
    "lr": (1e-9, 1),
    "bank": (10, 100_000),
    "steps": (1, 64),
    "temperature": (1e-3, 1e3),
    "smoothing": (0, 0.9),
    "classification_weight": (0, 1e3),
    "contrast_weight": (0, 1e3),
}


# ---------------------------------------------------------------- what the command lines share


class Parser(argparse.ArgumentParser):
    """argparse's parser, but a wrong command line is an InputError: one line, without the usage block."""

    def error(self, message: str) -> None:
        raise InputError(message)


def flag_of(name: str) -> str:
    """The flag on the command line: "keep_epochs" -> "--keep-epochs"."""
    return "--" + name.replace("_", "-")


def is_given(value: object) -> bool:
    """Whether an option stands on the command line: all that may have no effect default to None."""
    return value is not None


def refuse_without_effect(args: argparse.Namespace, names: Iterable[str], reason: str) -> None:
    """Raises InputError if one of these options is given; `reason` completes "--flag has no effect ..."."""
    for name in names:
        if is_given(getattr(args, name)):
            raise InputError(f"{flag_of(name)} has no effect {reason}; leave it out")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises InputError if an option's value is not within low..high."""
    if not low <= value <= high:
        raise InputError(f"{flag_of(name)} {value}: out of range, give {low} to {high}")


# ---------------------------------------------------------------- train.py


def training_options(arguments: list[str] | None = None) -> tuple[argparse.Namespace, dict]:
    """What train.py is asked to do, and the options of the method, given or by default. Raises InputError if one is out
    of range or has no effect."""
    args = training_parser().parse_args(arguments)
    args.is_demo = args.data is None
    return args, method_options(args)


def training_parser() -> Parser:
    """All options; the defaults of those that belong to a method are in kit/settings.py, and here they are None."""
    parser = Parser(
        description="Train a detector on good images: python train.py --data mvtec/bottle; without --data, on a demo "
        "that it draws"
    )
    add = parser.add_argument
    add("--data", type=Path, help="folder with train/good, or of good images, or of such folders; else a drawn demo")
    add(
        "--method",
        type=method_name,
        metavar="{" + ",".join(OPTIONS) + "}",
        default="clflow",
        help="clflow, the default, or one of the others, each in the file of its name",
    )
    add("--out", type=Path, help="folder for model.pt and log.csv; runs/<category> if not given")
    add("--textures", type=Path, help="folder of texture photographs to paint defects from, beside the normal images")
    add("--defects", type=Path, help="folder of images with real defects, to learn from beside the painted ones")
    add("--defect-masks", type=Path, metavar="FOLDER", help="of their masks; ../ground_truth/<name> if not given")
    add("--corrections", type=Path, metavar="FILE", help="corrections.json, which a page of evaluate.py wrote")
    add("--epochs", type=int, help=default_text("epochs"))
    add("--batch", type=int, help=default_text("batch", "of images; of rows, single positions' features, for clflow"))
    add("--lr", type=float, help=default_text("lr", "peak learning rate of a one-cycle schedule"))
    size_help = "as many pixels as SIZE x SIZE, in the shape of the good images; or HEIGHTxWIDTH, or native"
    add("--size", type=parsed_size, help=default_text("size", size_help))
    add(
        "--roi", type=Path, metavar="MASK", help="picture, of the shape of the images: what is white in it is looked at"
    )
    add("--seed", type=int, default=0, help="(0)")
    add("--seeds", type=int, default=1, help="train this many, from SEED on, and write the table of their results (1)")
    add("--resume", action="store_true", default=None, help="go on where a stopped run was after its last whole epoch")
    add(
        "--keep-epochs",
        action="store_true",
        default=None,
        help="keep epoch_NN.pt of each epoch, for evaluate.py --curve",
    )
    add("--skip-bad", action="store_true", default=None, help="go on without images that cannot be read")
    add("--device", help="cpu, cuda, ... (a GPU, if there is one)")
    add_method_groups(parser)
    return parser


def add_method_groups(parser: Parser) -> None:
    """What belongs to the backbone and its prototypes, and to both forms of CL-Flow."""
    add = parser.add_argument_group("the backbone and its prototypes").add_argument
    backbones = "a ResNet of torchvision, or efficientnet_lite0"
    add("--backbone", metavar="NAME", help=default_text("backbone", backbones))
    add("--weights", help="file with the backbone's ImageNet weights, instead of a download")
    add("--bank", type=int, help=default_text("bank", "prototypes, normal features that cover all others"))
    local = "see features on the scale of the prototypes' spacing there"
    add("--local", action=argparse.BooleanOptionalAction, help=default_text("local", local))
    add = parser.add_argument_group("CL-Flow: what the paper leaves open").add_argument
    add("--steps", type=int, help=default_text("steps", "flow steps"))
    add("--classification-weight", type=float, help=default_text("classification_weight", "weight of L_cls"))
    add("--smoothing", type=float, help=default_text("smoothing", "label smoothing of L_cls"))
    add("--contrast-weight", type=float, help=default_text("contrast_weight", "weight of L_con"))
    add("--contrast", choices=("cosine", "energy"), help=default_text("contrast", "what InfoNCE compares"))
    add("--temperature", type=float, help=default_text("temperature", "temperature of L_con"))


def method_name(name: str) -> str:
    """A method's name. Raises argparse's error for anything else; the former name of one is told."""
    if name == "patchcore":
        hint = "is called nearest now; PatchCore's own distance is --method nearest --no-local"
        raise argparse.ArgumentTypeError(f"patchcore {hint}")
    if name not in OPTIONS:
        raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(OPTIONS)}")
    return name


def default_text(name: str, meaning: str = "") -> str:
    """The help of an option: its meaning, and its default for each method and for the demo, where they differ."""
    defaults = []
    for label, method in OPTIONS.items():
        if name in method.defaults:
            text = f"{label} {method.defaults[name]}"
            if name in method.demo:
                text += f", demo {method.demo[name]}"
            defaults.append(text)
    return f"{meaning} ({'; '.join(defaults)})".strip()


def method_options(args: argparse.Namespace) -> dict:
    """The options of args.method, given or by default. Raises InputError if one is out of range or has no effect."""
    method = OPTIONS[args.method]
    others = {name for other in OPTIONS.values() for name in other.defaults} - set(method.defaults)
    refuse_without_effect(args, sorted(others), f"with --method {args.method}")
    options = dict(method.defaults)
    if args.is_demo:
        options.update(method.demo)
    for name in options:
        if is_given(getattr(args, name)):
            options[name] = getattr(args, name)
    for name, (low, high) in RANGES.items():
        if name in options or name in ("seed", "seeds"):
            check_range(name, options.get(name, getattr(args, name)), low, high)
    check_size(options["size"])
    classifies = options.get("classification_weight") != 0
    contrasts = options.get("contrast_weight") != 0
    if not classifies:
        refuse_without_effect(args, ["smoothing"], "with --classification-weight 0")
    if not contrasts:
        refuse_without_effect(args, ["contrast", "temperature"], "with --contrast-weight 0")
    if args.method == "clflow" and not options["local"]:
        refuse_without_effect(args, ["bank"], "with --no-local")
    if not args.defects:
        refuse_without_effect(args, ["defect_masks"], "without --defects")
    if args.defects or args.corrections:
        check_learns_from_defects(options)
    if args.textures:
        options["textures"] = str(args.textures.resolve())
    for name in ("defects", "defect_masks", "corrections"):
        if getattr(args, name):
            options[name] = str(getattr(args, name).resolve())
    if args.roi:
        options["roi"] = str(args.roi.resolve())
    if not method.is_trained:
        refuse_without_effect(args, ["keep_epochs"], f"with --method {args.method}")
    return options


def check_learns_from_defects(options: dict) -> None:
    """Raises InputError if no loss would take rows of real defects."""
    if options["classification_weight"] == 0 and options["contrast_weight"] == 0:
        raise InputError("--classification-weight 0 --contrast-weight 0: then nothing learns from real defects")


# ---------------------------------------------------------------- evaluate.py


def evaluation_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """What evaluate.py is asked to do. Raises InputError if options contradict each other."""
    args = evaluation_parser().parse_args(arguments)
    check_evaluation(args)
    return args


def evaluation_parser() -> Parser:
    """All options; those that may have no effect default to None."""
    parser = Parser(
        description="Measure a detector: python evaluate.py runs/bottle; let it judge: ... --images new/; export: ... "
        "--export FILE"
    )
    add = parser.add_argument
    add("run", type=Path, help="run folder with model.pt in it, or a checkpoint")
    add("--data", type=Path, help="category with test/, instead of the one it was trained on")
    add("--images", type=Path, help="judge this image, or those in this folder and its subfolders, instead")
    add("--watch", action="store_true", default=None, help="with --images FOLDER: judge what arrives there, too")
    add("--explain", type=Path, metavar="IMAGE", help="draw what happens to this image, step by step, instead")
    add("--export", type=Path, metavar="FILE", help="write a torch.export program instead, or FILE.onnx")
    add(
        "--curve",
        action="store_true",
        default=None,
        help="measure each epoch that train.py --keep-epochs kept, instead",
    )
    add("--recalibrate", type=Path, metavar="FOLDER", help="take the threshold from these new good images instead")
    add(
        "--out",
        type=Path,
        help="folder for what --images (predictions/RUN/IMAGES) or --data (RUN/tests/NAME) finds, or file for "
        "--explain (explained.png, or explained-2.png and so on)",
    )
    add("--false-alarm", type=float, help=f"share of good images that may be flagged ({FALSE_ALARM})")
    add("--skip-bad", action="store_true", default=None, help="go on without images that cannot be read")
    add("--device", help="cpu, cuda, ... (a GPU, if there is one)")
    return parser


def check_evaluation(args: argparse.Namespace) -> None:
    """Raises InputError if options contradict each other, or have no effect beside each other."""
    modes = [
        name
        for name in ("data", "images", "explain", "export", "curve", "recalibrate")
        if is_given(getattr(args, name))
    ]
    if len(modes) > 1:
        raise InputError(f"{flag_of(modes[0])} and {flag_of(modes[1])} are two different things to do; give one")
    if args.export:
        refuse_without_effect(args, ["out", "false_alarm", "skip_bad", "device"], "with --export")
    if args.curve:
        refuse_without_effect(args, ["out", "false_alarm"], "with --curve")
    if args.recalibrate:
        refuse_without_effect(args, ["out"], "with --recalibrate")
    if args.explain:
        refuse_without_effect(args, ["skip_bad"], "with --explain")
    if args.watch:
        refuse_without_effect(args, ["skip_bad"], "with --watch")
    if not args.images:
        refuse_without_effect(args, ["watch"], "without --images FOLDER")
    if not modes:
        refuse_without_effect(args, ["out"], "without --images, --data or --explain")
    if args.false_alarm is not None and not 0 < args.false_alarm < 1:
        raise InputError(f"--false-alarm {args.false_alarm}: out of range, give a share between 0 and 1")
