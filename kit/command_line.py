"""How a script starts and ends: the options of train.py and evaluate.py, and which of them exclude each other; bad
input ends in one line on standard error and exit code 2, without a traceback. This file does not import PyTorch, which
takes seconds: --help and errors in the command line appear at once. Only the name of a backbone is checked later, since
torchvision knows the names."""

import argparse
import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from kit import InputError
from kit.settings import FALSE_ALARM, LITE0, OPTIONS
from kit.shapes import check_size, parsed_size

MEMORY_IS_FULL = "the memory is full; end other programs, or train with a smaller --size"
AFTER_THE_FIRST = 6.0  # seconds that other processes wait with an error
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
    """argparse's parser. A wrong command line raises InputError: one line, without the usage block."""

    def error(self, message: str) -> None:
        if message.startswith("unrecognized arguments") and ": -" not in message:  # as with --images *.png
            message += "; each value needs its option, and an option takes one value: for several images give a folder"
        raise InputError(message)


def flag_of(name: str) -> str:
    """The flag on the command line: "keep_epochs" -> "--keep-epochs"."""
    return "--" + name.replace("_", "-")


def refuse_without_effect(args: argparse.Namespace, names: Iterable[str], reason: str) -> None:
    """Raises InputError if one of these options is given; options that may have no effect default to None. `reason`
    completes "--flag has no effect ..."."""
    for name in names:
        if getattr(args, name) is not None:
            raise InputError(f"{flag_of(name)} has no effect {reason}; leave it out")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises InputError if an option's value is not within low..high."""
    if not low <= value <= high:
        raise InputError(f"{flag_of(name)} {value}: out of range; give a value from {low} to {high}")


# ---------------------------------------------------------------- train.py


def training_options(arguments: list[str] | None = None) -> tuple[argparse.Namespace, dict]:
    """The arguments of train.py, and the options of the method with their defaults filled in. Raises InputError if an
    option is out of range or has no effect."""
    args = training_parser().parse_args(arguments)
    args.is_demo = args.data is None
    return args, method_options(args)


def training_parser() -> Parser:
    """All options. Options of a method default to None here; their defaults are in kit/settings.py."""
    parser = Parser(
        description="Train a detector on good images, for example: python train.py --data mvtec/bottle. Without --data "
        "it draws a demo and trains on that."
    )
    add_folders(parser)
    add_training_options(parser)
    add_run_options(parser)
    add_method_groups(parser)
    return parser


def add_folders(parser: Parser) -> None:
    """The method, and the folders that training reads and writes."""
    add = parser.add_argument
    data_help = "folder with train/good, folder of good images, or folder of several categories (default: a drawn demo)"
    add("--data", type=Path, help=data_help)
    add("--method", choices=OPTIONS, default="clflow", help="method to train (default: clflow)")
    add("--out", type=Path, help="folder for model.pt and log.csv (default: runs/<category>)")
    add("--textures", type=Path, help="folder of texture images, a second source of synthetic defects (default: none)")
    add("--defects", type=Path, help="folder of images with real defects to learn from (default: none)")
    masks_help = (
        "folder with masks for --defects (default for my/bad: my/ground_truth/bad; for DATA/test/KIND: "
        "DATA/ground_truth/KIND)"
    )
    add("--defect-masks", type=Path, metavar="FOLDER", help=masks_help)
    add("--corrections", type=Path, metavar="FILE", help="corrections.json, saved from report.html (default: none)")


def add_training_options(parser: Parser) -> None:
    """How to train, and on which part of the images."""
    add = parser.add_argument
    add("--epochs", type=int, help=default_text("epochs", "number of training epochs"))
    batch_help = "batch size: feature vectors for clflow, images for the other methods"
    add("--batch", type=int, help=default_text("batch", batch_help))
    add("--lr", type=float, help=default_text("lr", "peak learning rate of the one-cycle schedule"))
    size_help = (
        "input size in pixels: N (area N x N, aspect ratio of good images), HEIGHTxWIDTH, or native (median size of "
        "the good images, to a multiple of 32)"
    )
    add("--size", type=parsed_size, help=default_text("size", size_help))
    roi_help = "mask image; only its white area is inspected (default: the whole image)"
    add("--roi", type=Path, metavar="MASK", help=roi_help)


def add_run_options(parser: Parser) -> None:
    """Which trainings to run, and on which device."""
    add = parser.add_argument
    add("--seed", type=int, default=0, help="random seed (default: 0)")
    seeds_help = "number of trainings, with seeds --seed, --seed + 1, ...; also writes a table if above 1 (default: 1)"
    add("--seeds", type=int, default=1, help=seeds_help)
    resume_help = "continue an unfinished training after its last complete epoch"
    add("--resume", action="store_true", default=None, help=resume_help)
    keep_help = "keep a checkpoint of each epoch, epoch_NN.pt, for evaluate.py --curve"
    add("--keep-epochs", action="store_true", default=None, help=keep_help)
    add("--skip-bad", action="store_true", default=None, help="skip images that cannot be read (default: stop)")
    add("--device", help="cpu, cuda, ... (default: cuda if available, else cpu)")


def add_method_groups(parser: Parser) -> None:
    """The options of the backbone and its prototypes, and those of both forms of CL-Flow."""
    add = parser.add_argument_group("backbone and prototypes").add_argument
    backbones = "frozen backbone: efficientnet_lite0, or a ResNet of torchvision"
    add("--backbone", metavar="NAME", help=default_text("backbone", backbones))
    weights = "file with the backbone's ImageNet weights (default: downloaded, or installed by pip)"
    add("--weights", metavar="FILE", help=weights)
    int8 = "compute a ResNet in 8-bit integers on CPUs that are fast at it (--method clflow and nearest only)"
    add("--int8", action=argparse.BooleanOptionalAction, help=default_text("int8", int8))
    add("--bank", type=int, help=default_text("bank", "maximum number of prototypes (stored normal features)"))
    local = (
        "take features relative to their nearest prototype, divided by the local spacing (--method clflow and nearest "
        "only)"
    )
    add("--local", action=argparse.BooleanOptionalAction, help=default_text("local", local))
    add = parser.add_argument_group("CL-Flow: options that the abstract leaves open, see docs/method.md").add_argument
    add("--steps", type=int, help=default_text("steps", "number of coupling steps in each flow"))
    classification = "weight of the classification loss L_cls; 0 turns it off"
    add("--classification-weight", type=float, help=default_text("classification_weight", classification))
    add("--smoothing", type=float, help=default_text("smoothing", "label smoothing of L_cls"))
    contrast = "weight of the contrastive loss L_con; 0 turns it off"
    add("--contrast-weight", type=float, help=default_text("contrast_weight", contrast))
    similarity = "similarity used by L_con (--method paper only)"
    add("--contrast", choices=("cosine", "energy"), help=default_text("contrast", similarity))
    add("--temperature", type=float, help=default_text("temperature", "temperature of L_con"))


def default_text(name: str, meaning: str) -> str:
    """The help of an option: its meaning and its default, for each method and for the demo where they differ."""
    defaults = {}
    for label, method in OPTIONS.items():
        if name in method.defaults:
            defaults[label] = str(method.defaults[name])
            if name in method.demo:
                defaults[label] += f" (demo: {method.demo[name]})"
    different = sorted(set(defaults.values()))
    if len(different) == 1:
        return f"{meaning} (default: {different[0]})"
    by_method = "; ".join(f"{label} {default}" for label, default in defaults.items())
    return f"{meaning} (default: {by_method})"


def method_options(args: argparse.Namespace) -> dict:
    """The options of args.method, defaults filled in. Raises InputError if one is out of range or has no effect."""
    method = OPTIONS[args.method]
    others = {name for other in OPTIONS.values() for name in other.defaults} - set(method.defaults)
    refuse_without_effect(args, sorted(others), f"with --method {args.method}")
    options = dict(method.defaults)
    if args.is_demo:
        options.update(method.demo)
    for name in options:
        if getattr(args, name) is not None:
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
    if options["backbone"] == LITE0:
        refuse_without_effect(args, ["int8"], f"with --backbone {LITE0}")
    if args.method == "clflow" and not options["local"]:
        refuse_without_effect(args, ["bank"], "with --no-local")
    if not args.defects:
        refuse_without_effect(args, ["defect_masks"], "without --defects")
    if not (classifies or contrasts):
        refuse_without_effect(args, ["textures"], "with --classification-weight 0 --contrast-weight 0")
        if args.defects or args.corrections:
            raise InputError(
                "--classification-weight 0 --contrast-weight 0: no loss would learn from real defects; "
                "leave one of them out"
            )
    for name in ("textures", "defects", "defect_masks", "corrections", "roi"):
        if getattr(args, name):
            options[name] = str(getattr(args, name).resolve())
    if "epochs" not in method.defaults:
        refuse_without_effect(args, ["keep_epochs"], f"with --method {args.method}")
    return options


# ---------------------------------------------------------------- evaluate.py


def evaluation_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The arguments of evaluate.py. Raises InputError if options contradict each other."""
    args = evaluation_parser().parse_args(arguments)
    check_evaluation(args)
    return args


def evaluation_parser() -> Parser:
    """All options. Those that may have no effect default to None."""
    parser = Parser(
        description="Measure a detector on its test images, for example: python evaluate.py runs/bottle. Or judge new "
        "images (--images), explain one image (--explain), export the detector (--export), measure each epoch "
        "(--curve), or set a new threshold (--recalibrate)."
    )
    add = parser.add_argument
    add("run", type=Path, help="run folder that contains model.pt, or a checkpoint file")
    add("--data", type=Path, help="category folder with test/ to measure on (default: the category it was trained on)")
    add("--images", type=Path, help="judge this image, or all images in this folder and its subfolders")
    add("--watch", action="store_true", default=None, help="with --images FOLDER: also judge new images as they arrive")
    add("--explain", type=Path, metavar="IMAGE", help="draw how this image is processed, step by step")
    add("--export", type=Path, metavar="FILE", help="export to ONNX (FILE.onnx) or as a torch.export program")
    add("--curve", action="store_true", default=None, help="measure each epoch that train.py --keep-epochs kept")
    add("--recalibrate", type=Path, metavar="FOLDER", help="set the threshold from the new good images in this folder")
    add(
        "--out",
        type=Path,
        help="folder for the results of --images (default: predictions/RUN/IMAGES) or of test images (default: RUN; "
        "with --data RUN/tests/NAME), or picture file for --explain (default: explained.png, explained-2.png, ...)",
    )
    rate_help = f"accepted share of flagged good images, 0 to 1 (default: the detector's own, normally {FALSE_ALARM})"
    add("--false-alarm", type=float, help=rate_help)
    skip_help = "skip unreadable images (default: stop; with --images: judge the others, then exit with code 2)"
    add("--skip-bad", action="store_true", default=None, help=skip_help)
    add("--device", help="cpu, cuda, ... (default: cuda if available, else cpu)")
    return parser


def check_evaluation(args: argparse.Namespace) -> None:
    """Raises InputError if options contradict each other, or one has no effect with another."""
    modes = [
        name
        for name in ("data", "images", "explain", "export", "curve", "recalibrate")
        if getattr(args, name) is not None
    ]
    if len(modes) > 1:
        raise InputError(f"{flag_of(modes[0])} and {flag_of(modes[1])} cannot be combined; give only one of them")
    if args.export:
        refuse_without_effect(args, ["out", "skip_bad", "device"], "with --export")
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
    if args.false_alarm is not None and not 0 < args.false_alarm < 1:
        raise InputError(f"--false-alarm {args.false_alarm}: out of range; give a share between 0 and 1")


# ---------------------------------------------------------------- how a script ends


def one_line(error: BaseException) -> str:
    """The last line of an error's text, where a loader's worker puts the cause; the error's type if it has no text."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[-1].removeprefix(f"{InputError.__module__}.{InputError.__name__}: ")


def is_first() -> bool:
    """Whether this is the first of torchrun's processes, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


def fail(line: str) -> None:
    """Write the line and end with code 2. If all processes of torchrun fail, only the first one writes: it ends, and
    torchrun then ends the others while they wait."""
    if not is_first():
        time.sleep(AFTER_THE_FIRST)
    print("error:", line, file=sys.stderr)
    sys.exit(2)


def stop(number: int, frame: object) -> None:
    """The handler of a signal that asks to end: SIGINT (Ctrl-C) or SIGTERM (kill, systemctl stop, docker stop)."""
    if hasattr(signal, "SIGCHLD"):  # background processes may end, too: PyTorch need not complain about that
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    raise KeyboardInterrupt(number)


def quit_on_signals() -> None:
    """Outside of `run_script`, such a signal ends the process at once, without a traceback: while PyTorch is imported,
    and after the script has ended, there is nothing to complete."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: os._exit(128 + number))


def run_script(main: Callable[[], None], on_interrupt: str = "stopped") -> None:
    """Call `main`. An error that only the user can fix becomes one line and exit code 2. A signal that asks to end
    becomes the line `on_interrupt` and exit code 128 + its number, as shells report it."""
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be anything
    # By default, a script started with & or nohup ignores SIGINT.
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        try:
            main()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    except KeyboardInterrupt as stopped:
        number = stopped.args[0] if stopped.args else signal.SIGINT
        if is_first():
            print(on_interrupt, file=sys.stderr)
        sys.exit(128 + number)
    except InputError as error:
        fail(one_line(error))
    except BrokenPipeError:  # as with "| head": nobody reads the lines any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)  # the number of SIGPIPE
    except OSError as error:
        if error.errno == errno.ENOMEM:  # a process could not be started
            fail(MEMORY_IS_FULL)
        is_about_a_file = error.filename is not None or error.errno == errno.ENOSPC
        hint = "; check the path, its permissions and the free disk space" if is_about_a_file else ""
        fail(f"{one_line(error)}{hint}")
    except MemoryError:
        fail(MEMORY_IS_FULL)
    except RuntimeError as error:
        kind = type(error).__name__  # PyTorch's classes, without importing it: the command line is read before
        if kind == "OutOfMemoryError":
            fail("the memory of the GPU is full; give --device cpu, or train with a smaller --size")
        if "DefaultCPUAllocator" in str(error):
            fail(MEMORY_IS_FULL)
        if str(error).startswith("DataLoader worker"):
            fail("a background process was killed, perhaps because the memory was full; continue with --resume")
        if kind != "DistBackendError" and "/gloo/transport/" not in str(error):  # Gloo's errors have no class
            raise
        fail(
            "another process of this run has ended; read the error that it printed, perhaps on another machine "
            f"({one_line(error)})"
        )
