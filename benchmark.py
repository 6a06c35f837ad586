"""Speed of the scripts, everything side by side in one run: a table, then one line of JSON per row.

  python benchmark.py                                               all that fits this machine
  python benchmark.py simclr_essl --dataset cifar10 --arch resnet18 one script, with its flags

Times are medians after a warm-up, of alternating calls, so that a drifting machine moves all alike.
A step is all that training does for one batch; forward_backward is the bare network, encoder and
heads, on the same views: what is left of a step is augmentation, loss and optimiser.
"""

import importlib
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from torch.utils.flop_counter import FlopCounterMode

SCRIPTS = [
    name
    for name in ("simclr_essl", "simsiam_essl", "care", "sfrik", "homomorphic", "photonics_reg")
    if Path(__file__).with_name(f"{name}.py").exists()
]


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


def essl_parts(script, method, images):
    """E-SimCLR and E-SimSiam: the views of a batch, and the bare network on them."""

    def augment():
        return [method.view(images, i) for i in range(len(method.policies))]

    views = augment()
    if method.predictor:
        small = views.pop()
        others = hasattr(method, "versions")  # simclr_essl predicts other transformations too
        turned = method.versions(small, method.classes > 4)[0] if others else script.rotate4(small)

    def network():
        with script.autocast(method.config, images.device):
            outputs = [method.projector(method.features(view)) for view in views]
            outputs = [method.h(z) if hasattr(method, "h") else z for z in outputs]
            outputs += [method.predictor(method.features(turned))] if method.predictor else []
        sum(output.float().sum() for output in outputs).backward()

    return augment, network


def care_parts(script, method, images):
    """CARE: the views of a batch, two of them in chunks, and the bare network on them."""
    chunks = [None, None] + [method.config.chunks] * 2 * (method.config.lam > 0)

    def augment():
        return [method.a(images, chunks=chunk) for chunk in chunks]

    views = augment()

    def network():
        sum(method.f(view).float().sum() for view in views).backward()

    return augment, network


PARTS = {"simclr_essl": essl_parts, "simsiam_essl": essl_parts, "care": care_parts}


def script_row(name, argv, repeats):
    """Times of one training step of a script and of its parts, as a dict."""
    script = importlib.import_module(name)
    config = script.parse_args(argv)
    device = script.start(config)
    shape = (config.batch_size, 3, config.size, config.size)
    images = torch.randint(256, shape, dtype=torch.uint8, device=device)
    labels = torch.zeros(len(images), dtype=torch.int64, device=device)
    method = script.Method(config).to(device, memory_format=torch.channels_last)
    optimizer = script.make_optimizer(method, config)
    augment, network = PARTS[name](script, method, images)
    if config.compile:
        method.compile()

    def step():
        loss, _ = method(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with FlopCounterMode(display=False) as flops:
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ms = milliseconds({"step": step, "augment": augment, "network": network}, device, repeats)
    tflops = flops.get_total_flops() / ms["step"] / 1e9
    return {
        "script": name,
        "flags": " ".join(argv),
        "device": str(device),
        "images_per_second": 1000 * config.batch_size / ms["step"],
        "step_ms": ms["step"],
        "augment_ms": ms["augment"],
        "forward_backward_ms": ms["network"],
        "step_over_network": ms["step"] / ms["network"],
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 2**30
        if device.type == "cuda"
        else None,
        "tflops": tflops,
        "fraction_of_matmul_peak": tflops / matmul_tflops(device),
    }


def augmentation_row(n=512, repeats=5):
    """Images/s on one core: simclr_essl's large CIFAR view, and torchvision's transforms on PIL."""
    from simclr_essl import Config, augment, draw_augmentation, view_policies

    threads, cpu = torch.get_num_threads(), torch.device("cpu")
    torch.set_num_threads(1)
    images = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8)
    pictures, policy = [TF.to_pil_image(image) for image in images], view_policies(Config())[0]
    transform = T.Compose(
        [
            T.RandomResizedCrop(32, policy.scale),
            T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(*policy.jitter)], 0.8),
            T.RandomGrayscale(policy.gray),
            T.ToTensor(),
            T.Normalize((0.5,) * 3, (0.25,) * 3),
        ]
    )
    ms = milliseconds(
        {
            "batched": lambda: (
                (augment(images, draw_augmentation(n, policy, 32, 32, cpu), 32) - 0.5) / 0.25
            ),
            "pil": lambda: torch.stack([transform(picture) for picture in pictures]),
        },
        cpu,
        repeats,
    )
    torch.set_num_threads(threads)
    return {
        "augmentation": "CIFAR view, one core",
        "batched_images_per_second": 1000 * n / ms["batched"],
        "pil_images_per_second": 1000 * n / ms["pil"],
        "ratio": ms["pil"] / ms["batched"],
    }


def show(rows):
    """A small table of each row, then all rows as lines of JSON."""
    for row in rows:
        print()
        for name, value in row.items():
            print(
                f"  {name:26} {value:.4g}" if isinstance(value, float) else f"  {name:26} {value}"
            )
    print()
    for row in rows:
        print(json.dumps(row | {"torch": torch.__version__, "threads": torch.get_num_threads()}))


def main(argv):
    """Everything, or one script with its flags."""
    if argv and argv[0] not in SCRIPTS:
        print(f"error: choose a script of {', '.join(SCRIPTS)}", file=sys.stderr)
        raise SystemExit(2)
    if argv:
        rows = [script_row(argv[0], argv[1:], 5)]
    else:
        flags = [] if torch.cuda.is_available() else ["--batch-size", "64"]  # a step in seconds
        rows = [script_row(name, flags, 3) for name in SCRIPTS]
        if "care" in SCRIPTS:
            rows += [script_row("care", [*flags, "--lam", "0"], 3)]
            ratio = rows[SCRIPTS.index("care")]["step_ms"] / rows[-1]["step_ms"]
            rows += [
                {
                    "comparison": "CARE's step over SimCLR's, four forwards of N images over two",
                    "ratio": ratio,
                }
            ]
        rows.append(
            augmentation_row()
        )  # last: as in training, the allocator keeps its memory by now
    show(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
