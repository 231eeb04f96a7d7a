"""Published implementations that the kernels are measured against: how each is installed and called.

Each runs in a virtual environment of its own, so that none decides the versions of another. The functions here are
called inside of it, and load what is installed there by name. Where a peer takes its inputs in another form, such as a
step size and a rate in place of a log-decay, the conversion is part of what is timed; it is elementwise and small.
"""

import importlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Peers need no more of ours than this.
JAX = "jax"


@dataclass(frozen=True)
class Peer:
    """A package: what to install, in two steps where its pins contradict ours, and on which platforms it runs.

    `find` gives the contender for (case, platform), a function of the named arrays of the case.
    """

    requirements: tuple[str, ...]
    find: Callable[[str, str], Callable[..., Any]]
    alone: tuple[str, ...] = ()
    platforms: tuple[str, ...] = ("cpu", "gpu")
    torch: bool = False


def _lacks(case: str) -> NotImplementedError:
    return NotImplementedError(f"it has no op for {case}")


def _jla(implementation: str | None) -> Callable[[str, str], Callable[..., Any]]:
    """jax-linear-attention; its kernels on a GPU, elsewhere the implementation of that name."""
    kinds = {
        "linear": "simple_gla",
        "linear_head": "simple_gla",
        "linear_channel": "gla",
        "delta": "deltanet",
        "delta_gated": "gated_deltanet",
        "selective": "mamba1",
    }

    def find(case: str, platform: str):
        if case not in kinds:
            raise _lacks(case)
        attend = importlib.import_module("jla.ops").linear_attention
        jnp = importlib.import_module("jax.numpy")
        options = {"impl": "mosaic_gpu" if platform == "gpu" else implementation, "scale": 1.0}

        def run(**arrays):
            if case == "selective":
                names = {"dt": arrays["delta"], "a": arrays["A"]}
                return attend(kinds[case], arrays["C"], arrays["B"], arrays["u"], **names, **options)[0]
            gates = {name: arrays[name] for name in ("g", "beta") if name in arrays}
            if case == "linear":
                gates["g"] = jnp.zeros(arrays["q"].shape[:3])
            return attend(kinds[case], arrays["q"], arrays["k"], arrays["v"], **gates, **options)[0]

        return run

    return find


def _mamba2(case: str, platform: str):
    """mamba2-jax: log-decays are rates times softplus(delta), and values are multiplied by the step size."""
    del platform
    if case != "linear_head":
        raise _lacks(case)
    forward = importlib.import_module("mamba2_jax.modeling").ssd_forward
    jnp = importlib.import_module("jax.numpy")

    def run(q, k, v, g):
        heads = q.shape[2]
        rates, zeros = -jnp.ones(heads), jnp.zeros(heads)
        before_softplus = jnp.log(jnp.expm1(-g))
        options = {"chunk_size": 256, "D": zeros, "dt_bias": zeros, "dt_min": 0.0, "dt_max": jnp.inf}
        return forward(-v / g[..., None], before_softplus, rates, k, q, **options)[0]

    return run


def _ejkernel(case: str, platform: str):
    """ejkernel, by XLA."""
    del platform
    root = "ejkernel.kernels._xla."
    jnp = importlib.import_module("jax.numpy")
    if case == "linear":
        recurrent = importlib.import_module(root + "recurrent").recurrent
        return lambda q, k, v: recurrent(q, k, v, softmax_scale=1.0)[0]
    if case == "linear_head":
        scan = importlib.import_module(root + "state_space_v2").state_space_v2

        def run(q, k, v, g):
            heads = q.shape[2]
            y = scan(-v / g[..., None], -jnp.ones(heads), k, q, jnp.zeros(heads), -g, n_groups=heads)[0]
            return y.reshape(v.shape)

        return run
    if case == "linear_channel":
        gla = importlib.import_module(root + "gla").recurrent_gla
        return lambda q, k, v, g: gla(q, k, v, g, softmax_scale=1.0)[0]
    if case.startswith("delta"):
        rule = importlib.import_module(root + "gated_delta_rule").gated_delta_rule
        # It divides queries by sqrt(K), found by comparison with the definition.
        return lambda q, k, v, beta, g=None: rule(
            q * k.shape[-1] ** 0.5, k, v, beta, g, use_qk_l2norm=False, chunk_size=64
        )[0]
    if case == "selective":
        scan = importlib.import_module(root + "state_space_v1").state_space_v1
        return lambda u, delta, A, B, C: scan(u, A, B, C, jnp.zeros(u.shape[2]), delta)[0]
    raise _lacks(case)


def _recurrentgemma(case: str, platform: str):
    """recurrentgemma: its linear scan."""
    del platform
    if case not in ("real", "complex"):
        raise _lacks(case)
    scan = importlib.import_module("recurrentgemma.jax.scan").linear_scan
    return lambda a, x: scan(x, a)[0]


def _discretax(case: str, platform: str):
    """discretax: DeltaNet; its other layers call `jax.lax.associative_scan`."""
    del platform
    if case != "delta":
        raise _lacks(case)
    head = importlib.import_module("discretax.sequence_mixers.deltanet").chunk_delta_rule_head
    jax = importlib.import_module("jax")
    over = jax.vmap(jax.vmap(head, (1, 1, 1, 1, None), 1), (0, 0, 0, 0, None))
    return lambda q, k, v, beta: over(q, k, v, beta, 64)


def _fla(case: str, platform: str):
    """flash-linear-attention, by Triton."""
    del platform

    def load(module: str, name: str):
        return getattr(importlib.import_module(f"fla.ops.{module}"), name)

    if case == "linear":
        attend = load("linear_attn", "chunk_linear_attn")
        return lambda q, k, v: attend(q, k, v, scale=1.0, normalize=False)[0]
    if case == "linear_head":
        attend = load("simple_gla", "chunk_simple_gla")
        return lambda q, k, v, g: attend(q, k, v, g, scale=1.0)[0]
    if case == "linear_channel":
        attend = load("gla", "chunk_gla")
        return lambda q, k, v, g: attend(q, k, v, g, scale=1.0)[0]
    if case == "delta":
        rule = load("delta_rule", "chunk_delta_rule")
        # Its kernels take one dtype.
        return lambda q, k, v, beta: rule(q, k, v, beta.to(q.dtype), scale=1.0)[0]
    if case == "delta_gated":
        rule = load("gated_delta_rule", "chunk_gated_delta_rule")
        return lambda q, k, v, beta, g: rule(q, k, v, g, beta.to(q.dtype), scale=1.0)[0]
    raise _lacks(case)


def _mamba(case: str, platform: str):
    """mamba-ssm: the CUDA scan, and Mamba-2 by Triton."""
    del platform
    if case == "selective":
        scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn

        def run(u, delta, A, B, C):
            u, delta, B, C = (each.transpose(1, 2).contiguous() for each in (u, delta, B, C))
            return scan(u, delta.to(u.dtype), A, B, C).transpose(1, 2)

        return run
    if case == "linear_head":
        combined = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
        torch = importlib.import_module("torch")

        def run_heads(q, k, v, g):
            rates = -torch.ones(q.shape[2], device=q.device)
            return combined((-v / g[..., None]).to(q.dtype), -g, rates, k, q, chunk_size=256)

        return run_heads
    raise _lacks(case)


_GPU = ("gpu",)
PEERS = {
    "jax-linear-attention": Peer(("jax-linear-attention==0.1.0",), _jla("chunked")),
    "jax-linear-attention, token scan": Peer(("jax-linear-attention==0.1.0",), _jla("reference"), platforms=("cpu",)),
    "mamba2-jax": Peer(("mamba2-jax==1.1.2",), _mamba2, platforms=("cpu",)),
    "ejkernel": Peer(
        ("jaxtyping", "beartype", "pydantic", "chex", "einops", "tqdm"),
        _ejkernel,
        alone=("ejkernel==0.0.80.3",),  # asks for jax 0.10
        platforms=("cpu",),
    ),
    "recurrentgemma": Peer(
        ("flax", "typeguard<3", "sentencepiece", "einops", "jaxtyping"),
        _recurrentgemma,
        alone=("recurrentgemma==1.0.1",),  # asks for an older NumPy
        platforms=("cpu",),
    ),
    "discretax": Peer(("discretax==0.3.0",), _discretax, platforms=("cpu",)),
    "flash-linear-attention": Peer(
        ("torch", "triton", "flash-linear-attention==0.6.0"), _fla, platforms=_GPU, torch=True
    ),
    "mamba-ssm": Peer(("torch", "mamba-ssm==2.3.2.post1"), _mamba, platforms=_GPU, torch=True),
}
# What else implements one of the cases, and why it is not timed.
LEFT_OUT = {
    "deltanet-tpu, gdn2-pallas, tokamax": "their kernels of the delta rule are for TPUs",
    "mlstm-kernels": "another recurrence, for which there is no op here",
    "mamba3-jax": "another recurrence, for which there is no op here",
    "linax": "its layers call jax.lax.associative_scan, which is timed as such",
    "maxtext": "its gated delta rule is part of a trainer for large models and was not installed",
    "axlearn": "it has deleted its kernels of state-space models",
}


def environment(name: str, folder: Path) -> Path:
    """The interpreter of a peer's environment below `folder`, which is made if it isn't there.

    Raises:
        NotImplementedError: it can't be installed, with pip's last words.
    """
    peer = PEERS[name]
    place = folder / name.split(",")[0]
    python, done = place / "bin" / "python", place / "installed"
    if not done.exists():
        base = () if peer.torch else (f"{JAX}=={version(JAX)}",)
        steps = [[sys.executable, "-m", "venv", str(place)]]
        install = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        steps.append([*install, *base, *peer.requirements])
        if peer.alone:
            steps.append([*install, "--no-deps", *peer.alone])
        for step in steps:
            run = subprocess.run(step, capture_output=True, text=True, check=False)
            if run.returncode:
                last = (run.stderr.strip() or run.stdout.strip() or "no message").splitlines()[-1]
                raise NotImplementedError(f"not installed: {last}")
        done.touch()
    return python
