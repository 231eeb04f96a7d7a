"""Makes the fixtures of `test_interop.py`: tiny models with random weights, and what `transformers` computes with them.

Each folder has `config.json` and weights as `save_pretrained` writes them, and `expected.safetensors`: `tokens`, the
residual stream before and after every block, `hidden_0` .. `hidden_N`, and `logits`, with the versions of the packages
in its metadata. Every weight is random, biases and norms too, since zeros and ones hide that they are used wrongly;
sequences are longer than the windows. It needs an environment of its own, which tests don't:

    python -m venv torch-venv
    torch-venv/bin/pip install torch==2.13.0 transformers==5.24.0 safetensors
    torch-venv/bin/python tests/seqmod/interop/make_fixtures.py [NAME ...]
"""

import copy
import shutil
import sys
from pathlib import Path

import safetensors
import torch
import transformers
from safetensors.torch import save_file

FIXTURES = Path(__file__).with_name("fixtures")
BATCH, LENGTH, VOCABULARY = 2, 19, 31

SMALL = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = SMALL | {"hidden_size": 24, "intermediate_size": 28, "num_attention_heads": 4, "max_position_embeddings": 64}

MODELS = {
    "mamba": (
        transformers.MambaForCausalLM,
        transformers.MambaConfig(**SMALL, hidden_size=20, state_size=5, conv_kernel=3, time_step_rank=7),
    ),
    "mamba_bias": (
        transformers.MambaForCausalLM,
        transformers.MambaConfig(
            **SMALL,
            hidden_size=18,
            state_size=3,
            expand=1,
            use_bias=True,
            use_conv_bias=False,
            tie_word_embeddings=False,
        ),
    ),
    "mamba2": (
        transformers.Mamba2ForCausalLM,
        transformers.Mamba2Config(
            **SMALL, hidden_size=18, head_dim=6, num_heads=6, state_size=5, n_groups=2, conv_kernel=3, chunk_size=8
        ),
    ),
    "mamba2_limit": (
        transformers.Mamba2ForCausalLM,
        transformers.Mamba2Config(
            **SMALL,
            hidden_size=14,
            head_dim=4,
            num_heads=7,
            state_size=5,
            n_groups=1,
            chunk_size=8,
            time_step_limit=(0.01, 0.05),
            use_conv_bias=False,
            tie_word_embeddings=True,
        ),
    ),
    "recurrent_gemma": (
        transformers.RecurrentGemmaForCausalLM,
        transformers.RecurrentGemmaConfig(
            **SMALL | {"num_hidden_layers": 3},
            hidden_size=24,
            intermediate_size=2 * 22,
            num_attention_heads=2,
            num_key_value_heads=1,
            lru_width=14,
            conv1d_width=3,
            attention_window_size=7,
            logits_soft_cap=3.0,
            block_types=("recurrent", "attention"),
        ),
    ),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=23, n_embd=18, n_layer=2, n_head=3, bos_token_id=1, eos_token_id=2
        ),
    ),
    "gpt2_scaled": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=LENGTH,
            n_embd=18,
            n_layer=2,
            n_head=2,
            n_inner=26,
            bos_token_id=1,
            eos_token_id=2,
            scale_attn_weights=False,
            scale_attn_by_inverse_layer_idx=True,
            tie_word_embeddings=False,
            activation_function="relu",
        ),
    ),
    "llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**LLAMA, num_key_value_heads=2, rms_norm_eps=1e-3),
    ),
    "llama_bias": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(
            **LLAMA,
            head_dim=10,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 50.0},
        ),
    ),
    "mistral": (
        transformers.MistralForCausalLM,
        transformers.MistralConfig(**LLAMA, num_key_value_heads=2, sliding_window=5),
    ),
    "qwen2": (
        transformers.Qwen2ForCausalLM,
        transformers.Qwen2Config(
            **LLAMA, num_key_value_heads=1, use_sliding_window=True, sliding_window=7, max_window_layers=1
        ),
    ),
    "qwen3": (
        transformers.Qwen3ForCausalLM,
        transformers.Qwen3Config(**LLAMA, num_key_value_heads=2, head_dim=10, rms_norm_eps=1e-2),
    ),
    "llama_linear": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**LLAMA, rope_parameters={"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}),
    ),
    # Of the five frequencies, one stays, two are in between, two are divided.
    "llama_3": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(
            **LLAMA,
            head_dim=10,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 50.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 40,
            },
        ),
    ),
}
SHARDED = {"mamba2", "mistral"}
BFLOAT16 = {"mistral", "recurrent_gemma"}


@torch.no_grad()
def disturb(model: torch.nn.Module) -> None:
    """Random weights: matrices of variance 1 / fan-in, everything else its initial value plus noise."""
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape)
        if "embed" in name or name.endswith(("wte.weight", "wpe.weight")):
            weight.copy_(noise / 2)
        elif weight.ndim > 1 and name.endswith("weight"):
            # GPT-2 has its matrices the other way round.
            fan_in = weight.shape[0] if ".c_" in name else weight[0].numel()
            weight.copy_(noise / fan_in**0.5)
        else:
            weight.add_(0.3 * noise)


@torch.no_grad()
def make(name: str, seed: int) -> None:
    """Writes one folder."""
    kind, config = MODELS[name]
    torch.manual_seed(seed)
    model = kind(config).eval()
    disturb(model)
    folder = FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    saved = model
    if name in BFLOAT16:
        # Only the weights are rounded: buffers, such as the frequencies of rotations, are not stored.
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
        saved = copy.deepcopy(model).bfloat16()
    saved.save_pretrained(folder, max_shard_size="8KB" if name in SHARDED else "1GB")
    (folder / "generation_config.json").unlink()

    blocks = model.transformer.h if hasattr(model, "transformer") else model.base_model.layers
    hidden = []
    blocks[0].register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0]))
    for block in blocks:
        block.register_forward_hook(
            lambda module, inputs, output: hidden.append(output[0] if isinstance(output, tuple) else output)
        )
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH))
    logits = model(tokens, use_cache=False).logits
    expected = {f"hidden_{layer}": each.contiguous() for layer, each in enumerate(hidden)}
    versions = {package.__name__: package.__version__ for package in (safetensors, torch, transformers)}
    save_file(
        {"tokens": tokens.to(torch.int32), "logits": logits} | expected,
        folder / "expected.safetensors",
        versions,
    )


if __name__ == "__main__":
    for seed, name in enumerate(MODELS):
        if not sys.argv[1:] or name in sys.argv[1:]:
            make(name, seed)
