"""Decodes folders of photographs once, into arrays that the scripts map into memory.

  python prepare.py PATH --out data/mine
  python simclr_essl.py --dataset folder --data-root data/mine

PATH/train/CLASS/ holds the images to train on, PATH/val/CLASS/ those to evaluate on, of any format
that Pillow reads. Without classes they lie in PATH/train/ itself. PATH/val/ may be missing.
Every image is turned upright by its EXIF tag, its middle square is cut out and resized to --size.

Written are train-images.npy, uint8 (N, 3, size, size), train-labels.npy, int64 (N,), the same two
for val (with N = 0 if there is none) and classes.json, the names of the classes. Arrays of your own
with these names do as well. An image of the default size takes 442 kB, ImageNet 567 GB, or 252 GB
with --size 256. What does not fit into memory is read from the disk in random order, so that should
be a fast local one. A 4:3 picture loses an eighth at either end, and resolution.
"""
import json
import os
import shutil
import sys
import time
import unicodedata
import zlib
from argparse import ArgumentParser
from collections import Counter
from datetime import timedelta
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

NO_PICTURES = "BUFR EPS FITS FLI GRIB HDF5 IPTC MPEG PALM PCD PDF WMF".split()  # known to PIL
LEFTOVERS = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN")  # folders that systems leave
# lets Pillow read a PNG with up to 1 GB of text and colour profiles, which are not used here
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**30

def stop(message):
    """Ends the program with a message."""
    raise SystemExit(f"error: {message}")

def with_progress(items, total, name):
    """Yields the items; says after ten seconds, and then every now and then, how far they are."""
    began, due = time.time(), 10  # seconds
    for done, item in enumerate(items):
        passed = time.time() - began
        if done > 0 and passed > due:
            left = timedelta(seconds=round(passed / done * (total - done)))
            line = f" {name} {done} of {total}, {left} left"
            if sys.stdout.isatty():  # on a terminal: the same line, every second
                print(line, end="\r", flush=True)
                due = passed + 1
            else:  # in a file: a new line after 10, 20, 40, ... seconds
                print(line, flush=True)
                due = 2 * passed
        yield item

# %% FILES -----------------------------------------------------------------------------------------
def list_folder(folder):
    """The files and the folders in a folder, each sorted, without what systems leave there."""
    inside = [Path(folder, name) for name in sorted(os.listdir(folder))
              if not name.startswith(".") and name not in LEFTOVERS]
    files = [path for path in inside if not path.is_dir()]
    return files, [path for path in inside if path.is_dir()]

def walk(folder, visited):
    """Yields the files in a folder and below; enters no real folder that was visited."""
    files, folders = list_folder(folder)
    yield from files
    for subfolder in folders:
        real = os.path.realpath(subfolder)  # a symbolic link may lead back up
        if real not in visited:
            visited.add(real)
            yield from walk(subfolder, visited)

def is_picture(path):
    """Whether Pillow reads files of this extension, as pictures."""
    known = Image.registered_extensions().get(path.suffix.lower())
    return known is not None and known not in NO_PICTURES

def count_kinds(files):
    """How many files there are of each extension, such as: .txt 12, .mp4 3."""
    kinds = Counter(path.suffix.lower() or "no extension" for path in files)
    return ", ".join(f"{kind} {n}" for kind, n in kinds.most_common(9))

def list_pictures(path, wanted, per_class):
    """{image: its class} of the images in path/CLASS/ and below; prints what was found.

    If path has no folders, its own files are taken, as class ".". wanted: the classes to read, all
    if it is empty. per_class: the most images of a class.
    """
    loose, folders = list_folder(path)  # loose files are beside the folders of classes
    if not folders:  # no classes
        loose, folders = [], [path]
    # real paths, so that walk follows no link back into one of these
    visited = {os.path.realpath(folder) for folder in [path, *folders]}
    pictures, ignored = {}, []
    for folder in folders:
        # one accented letter may be coded in two ways, of which NFC is the first
        name = "." if folder == path else unicodedata.normalize("NFC", folder.name)
        if wanted and name not in wanted:
            continue
        files = list(walk(folder, visited))
        found = [file for file in files if is_picture(file)][:per_class]
        ignored += [file for file in files if not is_picture(file)]
        if not found and path.name == "train":  # val may lack classes
            stop(f"{folder} has no image that Pillow reads (.heic: convert to JPEG first), but: "
                 f"{count_kinds(files) or 'nothing'}")
        pictures |= {file: name for file in found}
    classes = set(pictures.values()) - {"."}
    print(f"{path}: {len(pictures)} images, {len(classes)} classes", flush=True)
    if ignored:
        print(f"  ignored {len(ignored)} other files: {count_kinds(ignored)}")
    if loose:
        print(f"  left out {len(loose)} files beside the class folders: {count_kinds(loose)}")
    return pictures

# %% PICTURES --------------------------------------------------------------------------------------
def read_picture(path, size):
    """The middle square of an image file, upright, over white: uint8 (3, size, size)."""
    with open(path, "rb") as file:
        image = Image.open(file)
        image.draft("RGB", (2 * size, 2 * size))  # decodes a large JPEG at 1/2, 1/4 or 1/8
        image.load()
    try:
        ImageOps.exif_transpose(image, in_place=True)  # turns the pixels, then changes the tags
    except Exception as problem:  # broken EXIF can raise nearly anything: the pixels are good
        print(f"{path} may not be upright: its EXIF is broken ({problem})")
    if image.mode.startswith(("I", "F")):  # more than 8 bits
        image = Image.fromarray(to_8_bits(np.asarray(image, np.float32), "16" in image.mode))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    # cuts out the middle square and resizes it
    image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)

def to_8_bits(gray, has_16_bits):
    """Gray values as uint8: 16 bits from 0 to 65535, others from their least to their most."""
    low, high = 0, 65535
    if not has_16_bits:
        known = gray[np.isfinite(gray)]
        low, high = known.min(), known.max()
    scaled = (gray - low) / max(high - low, 1e-12)  # a constant image becomes 0
    return np.uint8(255 * np.nan_to_num(scaled).clip(0, 1))

def write_header(file, n, size):
    """Writes the header of a .npy file of n uint8 images, which is equally long for every n."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (n, 3, size, size)}
    np.lib.format.write_array_header_1_0(file, header)

def decode(files, size, path):
    """Writes the pictures of files to path, uint8 (N, 3, size, size); returns {damaged: why}."""
    damaged = {}

    def read(file):
        try:
            return read_picture(file, size).tobytes()
        except Exception as problem:  # a damaged file can raise nearly anything
            damaged[file] = problem
            return b""  # no image for this file

    blocks = [files[i:i + 64] for i in range(0, len(files), 64)]
    with ThreadPool() as pool, open(path, "wb") as out:
        write_header(out, len(files), size)
        for block in with_progress(blocks, len(blocks), f"{path.name}: block"):
            out.write(b"".join(pool.map(read, block)))
        out.seek(0)
        write_header(out, len(files) - len(damaged), size)
    return damaged

# %% MAIN ------------------------------------------------------------------------------------------
def choose(config):
    """{split: {image: its class}} and the sorted names of all classes."""
    train, val = config.path / "train", config.path / "val"
    wanted = set()  # empty: all classes
    if config.classes:
        lines = unicodedata.normalize("NFC", config.classes.read_text("utf-8-sig")).splitlines()
        wanted = {line.strip() for line in lines if line.strip()}
        if not wanted:
            stop(f"{config.classes} names no classes")
    if not config.path.is_dir():
        stop(f"there is no folder {config.path}")
    if not train.is_dir():
        stop(f"{train} is missing: put the images there, in folders of classes if there are any")
    splits = {"train": list_pictures(train, wanted, config.per_class), "val": {}}
    if val.is_dir():
        splits["val"] = list_pictures(val, wanted, None)
    classes = set(splits["train"].values())
    missing = sorted(wanted - classes)
    unknown = sorted(set(splits["val"].values()) - classes)
    if missing:
        stop(f"{train} lacks these classes of {config.classes}: {', '.join(missing[:9])}")
    if unknown:
        stop(f"images in {val} must lie in the class folders of {train}, not in these: "
             f"{', '.join(unknown[:9])}")
    return splits, sorted(classes)

def write_arrays(splits, classes, config):
    """Decodes into OUT.part, a folder that takes the name OUT when all is there."""
    out = config.out.resolve()
    described = {"size": config.size}  # source.json: tells whether OUT is of the same images
    for split, pictures in splits.items():
        files = [f"{file.relative_to(config.path)} {file.lstat().st_size}" for file in pictures]
        described[split] = zlib.crc32(os.fsencode("\n".join(files)))
    source = json.dumps(described)
    written = out / "source.json"
    if written.exists() and written.read_text() == source:
        print(f"{out} holds the arrays of these images already")
        return
    if out.exists() and any(out.iterdir()):
        stop(f"{out} is not empty: choose another --out")
    if any(out.is_relative_to((config.path / split).resolve()) for split in splits):
        stop(f"{out} lies among the images: choose another --out")
    part = out.with_name(out.name + ".part")
    if part.exists() and not (part / "source.json").exists():
        stop(f"{part} is in the way: remove or rename it")
    shutil.rmtree(part, ignore_errors=True)  # of a decoding that was killed
    if out.exists():
        out.rmdir()  # it is empty
    part.mkdir(parents=True)
    (part / "source.json").write_text(source)
    needed = sum(map(len, splits.values())) * 3 * config.size**2
    free = shutil.disk_usage(part).free
    print(f"arrays of {needed / 1e6:,.0f} MB; {free / 1e6:,.0f} MB are free in {out.parent}")
    if needed > free:
        shutil.rmtree(part)
        stop("too little room: choose a smaller --size or another --out")

    damaged = {}
    for split, pictures in splits.items():
        damaged |= decode(list(pictures), config.size, part / f"{split}-images.npy")
        labels = [classes.index(name) for file, name in pictures.items() if file not in damaged]
        np.save(part / f"{split}-labels.npy", np.array(labels, np.int64))
    if damaged:
        lines = "\n".join(f"{file} ({problem})" for file, problem in damaged.items())
        if not config.skip_damaged:
            shutil.rmtree(part)
            stop(f"{len(damaged)} files cannot be read; --skip-damaged leaves them out:\n{lines}")
        print(f"left out {len(damaged)} files that cannot be read:\n{lines}")
    if all(file in damaged for file in splits["train"]):
        shutil.rmtree(part)
        stop("no training image is left")
    (part / "classes.json").write_text(json.dumps(classes))
    part.rename(out)
    print(f"{out} is ready: --dataset folder --data-root {config.out}")

def main(argv=None):
    """Runs a command line."""
    parser = ArgumentParser("prepare.py", description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path, help="folder that holds train/ and perhaps val/")
    parser.add_argument("--out", type=Path, required=True, help="folder for the arrays")
    parser.add_argument("--size", type=int, default=384, help="side of the images (default: 384)")
    parser.add_argument("--classes", type=Path, help="file with the classes to read, one a line")
    parser.add_argument("--per-class", type=int, default=10**9,
                        help="the first so many images of each class of train/ (default: all)")
    parser.add_argument("--skip-damaged", action="store_true", help="leave damaged files out")
    config = parser.parse_args(argv)
    config.path, config.out = config.path.expanduser(), config.out.expanduser()
    if min(config.size, config.per_class) < 1:
        parser.error("--size and --per-class must be 1 or more")
    try:
        splits, classes = choose(config)
        write_arrays(splits, classes, config)
    except (OSError, UnicodeDecodeError) as problem:  # a folder, a full disk, a list not in UTF-8
        stop(problem)
    except KeyboardInterrupt:
        stop("stopped; the same command starts anew")

if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # file names that a terminal cannot show
    main()
