"""Curvature against PyHessian: the same work on the same network, in one process.

    pip install torch pyhessian     # beside this package's requirements
    python -m benchmarks.against_pyhessian --run=runs/dense_lenet5-.../seed_0

Top five eigenvalues, trace of 100 Rademacher probes and spectral density of 10 probes
of 100 Lanczos steps, of LeNet-5 over the first 1,000 training images: processor time
of both, round by round. PyHessian knows no masks: of a sparse run it takes the zeros
for parameters, with the same work.
"""

import argparse
import contextlib
import io
import time

import jax
import numpy as np
import torch
from pyhessian import hessian as PyHessian

from benchmarks.run import about
from lottery_flow.analysis import curvature, hutchinson, lanczos, spectrum
from lottery_flow.studies.common import device
from lottery_flow.study import open_run

N_IMAGES, N_EIGENVALUES, N_PROBES = 1000, 5, 100
N_STEPS, N_STARTS = 100, 10
TASKS = ("gradient", "top_5", "trace", "density")
N_AT_ONCE = 50  # what `analyze` does on a CPU


def torch_lenet5(params) -> torch.nn.Module:
    """LeNet-5 with the same weights; its images are [b c h w]."""
    relu, pool = torch.nn.ReLU, torch.nn.MaxPool2d
    model = torch.nn.Sequential(
        *(torch.nn.Conv2d(1, 6, 5), relu(), pool(2)),
        *(torch.nn.Conv2d(6, 16, 5), relu(), pool(2), torch.nn.Flatten()),
        *(torch.nn.Linear(256, 120), relu()),
        *(torch.nn.Linear(120, 84), relu(), torch.nn.Linear(84, 10)),
    )
    kernels = {k: np.asarray(v["kernel"]) for k, v in params.items()}
    # Flattened in the order [c h w] instead of [h w c].
    kernels["fc1"] = kernels["fc1"].reshape(4, 4, 16, 120).transpose(2, 0, 1, 3)
    kernels["fc1"] = kernels["fc1"].reshape(256, 120)
    layers = [m for m in model if hasattr(m, "weight")]
    for name, layer in zip(
        ("conv1", "conv2", "fc1", "fc2", "fc3"), layers, strict=True
    ):
        kernel = kernels[name]
        order = (3, 2, 0, 1) if kernel.ndim == 4 else (1, 0)
        weight = np.ascontiguousarray(kernel.transpose(order))
        layer.weight.data = torch.tensor(weight)
        layer.bias.data = torch.tensor(np.asarray(params[name]["bias"]))
    return model


def main() -> None:
    """Times both sides and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", required=True, help="seed_N directory of a run")
    parser.add_argument("--data_dir", default="", help="of TFDS")
    parser.add_argument("--step", type=int, default=-1, help="of the checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    args = parser.parse_args()
    torch.eig = _eig
    study = open_run(args.run, args.step, args.data_dir)
    (batch,) = study.train_batches(N_IMAGES, N_IMAGES)
    batches = study.train_batches(N_IMAGES, N_AT_ONCE)
    objective, params = study.objective("frozen"), device(study.network.params)
    masks = study.network.masks
    operator = curvature.hessian(objective, params, masks, batches)
    images = np.asarray(study.preprocess(batch["image"])).transpose(0, 3, 1, 2)
    labels = np.asarray(batch["label"])
    model = torch_lenet5(study.network.params).eval()
    data = (torch.tensor(images), torch.tensor(labels, dtype=torch.long))
    theirs = PyHessian(model, torch.nn.CrossEntropyLoss(), data=data, cuda=False)
    gradient = jax.jit(jax.grad(objective))
    key = jax.random.key(0)
    ours = {
        "top_5": lambda: lanczos.top_eigenpairs(operator, N_EIGENVALUES, key).values[0],
        "trace": lambda: float(hutchinson.trace(operator, key, n_probes=N_PROBES).mean),
        "density": lambda: float(
            lanczos.spectral_density(
                spectrum.hessian_operator(
                    *(objective, params, masks, batches), n_products=N_STEPS * N_STARTS
                ),
                key,
                n_steps=N_STEPS,
                n_probes=N_STARTS,
            ).nodes.max()
        ),
        "gradient": lambda: max(
            float(jax.tree.leaves(gradient(params, b))[0].max()) for b in batches
        ),
    }
    other = {
        "top_5": lambda: theirs.eigenvalues(top_n=N_EIGENVALUES)[0][0],
        # Without a tolerance that stops it earlier.
        "trace": lambda: np.mean(theirs.trace(maxIter=N_PROBES, tol=0.0)),
        "density": lambda: np.max(theirs.density(iter=N_STEPS, n_v=N_STARTS)[0]),
    }
    print("\n".join(about("benchmarks.against_pyhessian")))
    print(f"# torch {torch.__version__}, {torch.get_num_threads()} threads")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in args.tasks}
    for name in args.tasks:
        fn = ours[name]
        if name != "density":  # minutes, of which compiling is little
            fn()  # compiles
        for _ in range(args.rounds if name != "density" else 1):
            mine, value = _timed(fn)
            their, their_value = _timed(other[name]) if name in other else (np.nan, "")
            times[name].append((mine, their))
            print(f"{name}: {mine:.2f} s, PyHessian {their:.2f} s", flush=True)
            print(f"    {value} {their_value}", flush=True)
    for name, pairs in times.items():
        mine, their = np.median(np.array(pairs), axis=0)
        print(f"{name},{mine:.3f},{their:.3f},{their / mine:.2f}")


def _eig(matrix, eigenvectors):
    """What PyHessian 0.1 calls on a symmetric matrix, gone from newer torch."""
    values, vectors = torch.linalg.eigh(matrix)
    return torch.stack([values, torch.zeros_like(values)], 1), vectors


def _timed(fn) -> tuple[float, object]:
    began = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        value = fn()
    return time.process_time() - began, value


if __name__ == "__main__":
    main()
