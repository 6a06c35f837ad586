"""Speed of the scripts, everything side by side in one run: a table, then one line of JSON per row.

  python benchmark.py                                               all that fits this machine
  python benchmark.py simclr_essl --dataset cifar10 --arch resnet18 one script, with its flags
  python benchmark.py sfrik                  the same, and its loss beside its rivals
  python benchmark.py homomorphic            the same, and H-SSL's loss beside A-SSL's
  python benchmark.py photonics_reg          the same, and the time of a label

Times are medians after a warm-up. The calls that are compared alternate, so that a change of the
machine's speed affects all of them. A step is all that training does for one batch;
forward_backward is the bare network, encoder and heads, on the same views. The rest of a step is
augmentation, loss and optimiser.
"""
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import ImageFolder

import homomorphic
import photonics_reg
import prepare
import sfrik
from simclr_essl import augment, load_photos

SCRIPTS = ["simclr_essl", "simsiam_essl", "care", "sfrik", "homomorphic", "photonics_reg"]

def milliseconds(functions, device, repeats):
    """{name: median milliseconds} of functions without arguments, called in turn."""
    times = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first warms up
                times[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in times.items()}

def matmul_tflops(device):
    """Rate of a large matrix product, in the precision of the networks there: bf16 on CUDA."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / milliseconds({"matmul": lambda: a @ b}, device, 5)["matmul"] / 1e9

def views(script, method, images):
    """What a step embeds: the augmented images, or cells, of a batch."""
    if script.__name__ == "homomorphic" and method.config.ssl != "augmented":
        return method.canvas(images / 255)
    return method.views(images)

def bare_network(method, batch):
    """Records what the networks get in a step; returns a function that runs them on it again.

    It runs them forward and backward, as the step does, but without views, loss and optimizer.
    """
    calls = []

    def record(network, inputs, output):
        x = inputs[0].detach()
        bf16 = torch.is_autocast_enabled(x.device.type)
        calls.append((network, x, bf16, torch.is_grad_enabled()))

    hooks = [network.register_forward_hook(record) for network in method.children()]
    method(*batch)
    for hook in hooks:
        hook.remove()

    def run_again():
        total = 0
        for network, x, bf16, grad in calls:
            trained = any(p.requires_grad for p in network.parameters())
            # heads pass a gradient on to the encoder
            head = trained and network is not method.encoder
            autocast = torch.autocast(x.device.type, torch.bfloat16, enabled=bf16)
            with autocast, torch.set_grad_enabled(grad):
                total = total + network(x.float().requires_grad_(grad and head)).float().sum()
        total.backward()

    return run_again

def script_row(name, argv, repeats):
    """Times of one training step of a script and of its parts, as a dict."""
    script = importlib.import_module(name)
    config = script.parse_args(argv)
    device = script.start(config)
    if name == "photonics_reg":
        images = script.draw_cells(config.dataset, config.batch_size, 1).float().to(device)
    else:
        side = 96 if config.dataset == "stl10" else config.size
        if config.dataset in script.PHOTOS:
            side = 384  # as prepare.py writes them
        shape = (config.batch_size, len(script.MEAN_STD[config.dataset][0]), side, side)
        images = torch.randint(256, shape, dtype=torch.uint8, device=device)
    method = script.Method(config).to(device, memory_format=torch.channels_last)
    optimizer = script.make_optimizer(method, config)
    batch = [images]
    if name == "homomorphic":  # its classifier needs labels
        batch.append(torch.zeros(len(images), dtype=torch.int64, device=device))
    network = bare_network(method, batch)

    def step():
        loss, _ = method(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with FlopCounterMode(display=False) as flops:  # it cannot see into compiled networks
        step()
    if config.compile:
        for module in method.children():
            module.forward = torch.compile(module.forward, dynamic=False)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    parts = {"step": step, "augment": lambda: views(script, method, images), "network": network}
    ms = milliseconds(parts, device, repeats)
    tflops = flops.get_total_flops() / ms["step"] / 1e9
    return {
        "script": name, "flags": " ".join(argv), "device": str(device),
        "images_per_second": 1000 * config.batch_size / ms["step"],
        "step_ms": ms["step"], "augment_ms": ms["augment"], "forward_backward_ms": ms["network"],
        "step_over_network": ms["step"] / ms["network"],
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 2**30 or None,
        "tflops": tflops, "fraction_of_matmul_peak": tflops / matmul_tflops(device),
    }

def homomorphic_row(group, n, repeats):
    """H-SSL's loss and gradient over A-SSL's: one forward pass of MNIST's network over two."""
    line = ["--group", group, *([] if torch.cuda.is_available() else ["--width", "0.25"])]
    config = homomorphic.parse_args(line)
    device = homomorphic.start(config)
    method = homomorphic.Method(config).to(device)
    x = method.canvas(torch.rand(n, 1, 28, 28, device=device))

    def h_ssl():
        z = method.f(x)
        v1, v2 = [method.h(method.read(z, g)) for g in method.draw_fibers(n)]
        homomorphic.nce_loss(v1, v2, 0.1).backward()

    def a_ssl():
        g1, g2 = homomorphic.draw_group(x, group), homomorphic.draw_group(x, group)
        z1, z2 = [method.f(homomorphic.transform(x, g, group)) for g in (g1, g2)]
        g0, _ = method.draw_fibers(n)
        v1, v2 = method.h(method.read(z1, g0)), method.h(method.read(z2, g0))
        homomorphic.nce_loss(v1, v2, 0.1).backward()

    ms = milliseconds({"h": h_ssl, "a": a_ssl}, device, repeats)
    return {"comparison": f"H-SSL's loss and gradient over A-SSL's, {group}, n {n}",
            "ratio": ms["h"] / ms["a"]}

def label_row(repeats):
    """Seconds that the density of states of a photonic crystal takes, on one core."""
    cell = photonics_reg.draw_cells("gpm", 1, 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    label = {"label": lambda: photonics_reg.density_of_states(cell)}
    ms = milliseconds(label, torch.device("cpu"), repeats)["label"]
    torch.set_num_threads(threads)
    return {"labels": "density of states, one core", "threads": 1,
            "seconds_per_cell": ms / 1000}

LOSSES = {  # of two views (n, q); weights do not change the time
    "sfrik L=2": lambda a, b: sfrik.sfrik_loss(a, b, 2.0, (1, 40)),
    "sfrik L=3": lambda a, b: sfrik.sfrik_loss(a, b, 2.0, (1, 40, 40)),
    "vicreg": lambda a, b: sfrik.vicreg_loss(a, b, 10, 10, 1),
    "auh": lambda a, b: sfrik.auh_loss(a, b, 2.7, 2.5),
    "nt_xent": lambda a, b: sfrik.nt_xent(a, b, 0.15),
}

def allocated_peak(function, device):
    """GB that a call allocates at its peak, as torch's own allocators count it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events)) / 2**30

def loss_cost(name, n, q, device):
    """(milliseconds, GB) of a loss of two views (n, q), forward and backward."""
    z1, z2 = (torch.randn(n, q, device=device, requires_grad=True) for _ in range(2))

    def call():
        z1.grad = z2.grad = None
        LOSSES[name](z1, z2).backward()

    began = time.perf_counter()
    memory = allocated_peak(call, device)  # and warms up
    repeats = 1 if time.perf_counter() - began > 5 else 5
    return milliseconds({"loss": call}, device, repeats)["loss"], memory

def loss_rows(n, widths=(1024, 2048, 4096, 8192, 16384, 32768)):
    """Time and memory of SFRIK's loss and its rivals, for n images and embeddings of each width q.

    None: a smaller q already took more than 15 s (VICReg's time grows fourfold when q doubles), or
    the q x q matrices (VICReg) or n x n matrices (others) do not fit. VICReg forms its covariance
    as published: the norm of the off-diagonal part could be had from the n x n Gram matrix.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        room = torch.cuda.mem_get_info()[0]
    else:
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    rows, slow = [], set()
    for q in widths:
        row = {"losses": f"n {n}, q {q}"}
        for name in LOSSES:
            numbers = 12 * n * q + (6 * q * q if name == "vicreg" else 12 * n * n)
            ms, memory = None, None
            if name not in slow and 4 * numbers < room:  # 4 bytes each
                ms, memory = loss_cost(name, n, q, device)
                if ms > 15_000:
                    slow.add(name)
            row |= {f"{name} ms": ms, f"{name} GB": memory}
        both = row["vicreg ms"] and row["sfrik L=3 ms"]
        row["sfrik L=3 over vicreg"] = row["sfrik L=3 ms"] / row["vicreg ms"] if both else None
        rows.append(row)
    return rows

def augmentation_row(n=512, repeats=5):
    """Images/s on one core: simclr_essl's large CIFAR view, and torchvision's transforms on PIL."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8)
    pictures = [TF.to_pil_image(image) for image in images]
    transform = T.Compose([
        T.RandomResizedCrop(32, (0.2, 1.0)), T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), T.RandomGrayscale(0.2),
        T.ToTensor(), T.Normalize((0.5,) * 3, (0.25,) * 3)])
    ms = milliseconds({
        "batched": lambda: (augment(images, 32) - 0.5) / 0.25,
        "pil": lambda: torch.stack([transform(picture) for picture in pictures]),
    }, torch.device("cpu"), repeats)
    torch.set_num_threads(threads)
    return {
        "augmentation": "CIFAR view, one core", "threads": 1,
        "batched_images_per_second": 1000 * n / ms["batched"],
        "pil_images_per_second": 1000 * n / ms["pil"],
        "ratio": ms["pil"] / ms["batched"],
    }

def photographs_row(n=200, size=224):
    """Seconds to crop and flip n photographs of 12 megapixels, from arrays and from JPEG files.

    Arrays: rows of the file that prepare.py writes, cropped in batches. Files: torchvision's
    ImageFolder with a DataLoader of a worker for each core. All files but eight are links to these.
    """
    with tempfile.TemporaryDirectory() as folder:
        train, out = Path(folder, "train", "all"), Path(folder, "out")
        train.mkdir(parents=True)
        for i in range(n):
            if i < 8:
                smooth = F.interpolate(torch.rand(1, 3, 60, 80), (3000, 4000), mode="bicubic")[0]
                picture = (smooth + 0.02 * torch.randn(3000, 4000)).clamp(0, 1)  # with grain
                TF.to_pil_image(picture).save(train / f"{i}.jpg", quality=90)
            else:
                os.link(train / f"{i % 8}.jpg", train / f"{i}.jpg")
        began = time.perf_counter()
        prepare.main([folder, "--out", str(out)])
        prepared = time.perf_counter()
        images, _ = load_photos(out, "train")
        for rows in torch.randperm(n).split(50):
            augment(images[rows], size, scale=(0.08, 1.0), jitter=None, gray=0)
        cropped = time.perf_counter()
        transform = T.Compose([T.RandomResizedCrop(size), T.RandomHorizontalFlip(), T.ToTensor()])
        loader = torch.utils.data.DataLoader(ImageFolder(train.parent, transform), 50, shuffle=True,
                                             num_workers=os.cpu_count())
        for _ in loader:
            pass
        loaded = time.perf_counter()
    return {
        "photographs": f"{n} of 12 megapixels, crop and flip to {size} pixels",
        "prepare_seconds": prepared - began, "arrays_seconds": cropped - prepared,
        "folder_seconds": loaded - cropped, "ratio": (loaded - cropped) / (cropped - prepared),
    }

def show(rows):
    """All rows as small tables, then as lines of JSON."""
    for row in rows:
        print()
        for name, value in row.items():
            value = f"{value:.4g}" if isinstance(value, float) else value
            print(f"  {name:26} {value}")
    print()
    for row in rows:
        print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()} | row))

def main(argv):
    """Everything, or one script with its flags."""
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    if argv and argv[0] not in SCRIPTS:
        print(f"error: choose a script of {', '.join(SCRIPTS)}", file=sys.stderr)
        raise SystemExit(2)
    flags = [] if torch.cuda.is_available() else ["--batch-size", "64"]  # a step in seconds
    groups = ("translation", "rotation", "scale")
    if argv:
        rows = [script_row(argv[0], argv[1:] or flags, 5)]
        if argv[0] == "sfrik":
            rows += loss_rows(2048)
        if argv[0] == "homomorphic":
            rows += [homomorphic_row(group, 256, 5) for group in groups]
        if argv[0] == "photonics_reg":
            rows.append(label_row(9))
    else:
        rows = [script_row(name, flags, 3) for name in SCRIPTS]
        baseline = script_row("care", [*flags, "--lam", "0"], 3)
        ratio = rows[SCRIPTS.index("care")]["step_ms"] / baseline["step_ms"]
        rows += [baseline, {"comparison": "CARE's step over SimCLR's, four forwards of N images "
                                          "over two", "ratio": ratio}]
        rows += [homomorphic_row(group, 256, 3) for group in groups]
        rows += loss_rows(2048, (1024, 8192))
        rows.append(label_row(5))
        rows.append(photographs_row())
        rows.append(augmentation_row())  # last: the allocator keeps its memory by now
    show(rows)

if __name__ == "__main__":
    main(sys.argv[1:])
