"""Everything that can be set in a backbone."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from seqmod.blocks import Activation, BlockConfig, Norm
from seqmod.mixers import MIXERS, mixer_of

Positions = Literal["none", "learned"]
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class BackboneConfig:
    """`inputs` F features in, or a `vocabulary` of tokens, or both; `heads` output sizes by name.

    `mixers`: for each block the name of a mixer, which then has `attention_heads` heads, or a mixer's config;
    `causal` says for all blocks, or each, whether a mixer given by name looks only backwards.
    `context`: the longest sequence of mixers and positions that have a limit, and the distance beyond which earlier
    steps look alike to a relative position bias.
    `mlp`: hidden width, 0 for blocks that are a mixer alone. `activation`, `norm`, `epsilon`, `output_bias`: see
    `BlockConfig`. `conditioning` C: features per token that shift and scale every block's normalised input.
    `tied` names the head, as large as the vocabulary, that uses the tokens' embeddings as its matrix; `embedding_scale`
    multiplies embedded tokens, and logits of all heads are squashed to `logit_cap` tanh(. / logit_cap) if it is given.
    `scan` compiles repeated blocks once, with parameters stacked; `remat` recomputes blocks in the backward pass,
    and `row_chunk` computes MLPs for that many steps at a time (see `seqmod.stream`).
    `dtype` is that of the stream; parameters and outputs are float32.
    A config that a mixer cannot serve raises ValueError.
    """

    inputs: int = 0
    heads: tuple[tuple[str, int], ...] = ()
    mixers: tuple[Any, ...] = ("attention",) * 4
    width: int = 64
    mlp: int = 256
    attention_heads: int = 4
    context: int = 128
    init_scale: float = 1.0
    vocabulary: int = 0
    causal: bool | tuple[bool, ...] = True
    activation: Activation = "relu"
    norm: Norm = "rms"
    epsilon: float = 1e-6
    output_bias: bool = False
    positions: Positions = "none"
    conditioning: int = 0
    tied: str | None = None
    embedding_scale: float = 1.0
    logit_cap: float | None = None
    scan: bool = False
    remat: bool = False
    row_chunk: int = 0
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        if not self.mixers:
            raise ValueError("BackboneConfig: mixers is empty, expected one name or config per block")
        if (
            min(self.width, self.attention_heads, self.context) < 1
            or min(self.mlp, self.conditioning, self.row_chunk) < 0
        ):
            raise ValueError(
                f"BackboneConfig: width {self.width}, attention_heads {self.attention_heads} and context "
                f"{self.context} must be positive, mlp {self.mlp}, conditioning {self.conditioning} and row_chunk "
                f"{self.row_chunk} not negative"
            )
        if min(self.inputs, self.vocabulary) < 0 or self.inputs + self.vocabulary < 1:
            raise ValueError(
                f"BackboneConfig: inputs is {self.inputs} and vocabulary {self.vocabulary}, "
                "expected a positive number of at least one of them"
            )
        if len(dict(self.heads)) != len(self.heads):
            raise ValueError(f"BackboneConfig: heads {self.heads} name a head twice")
        if self.tied is not None and dict(self.heads).get(self.tied) != self.vocabulary:
            raise ValueError(
                f"BackboneConfig: tied is {self.tied!r}, expected a head with the {self.vocabulary} outputs of the "
                f"vocabulary, of {dict(self.heads)}"
            )
        if isinstance(self.causal, tuple) and len(self.causal) != self.layers:
            raise ValueError(f"BackboneConfig: causal has {len(self.causal)} entries, expected {self.layers}")
        for name, value, kinds in (("positions", self.positions, Positions), ("dtype", self.dtype, Dtype)):
            if value not in get_args(kinds):
                raise ValueError(f"BackboneConfig: {name} is {value!r}, expected one of {get_args(kinds)}")
        for layer in range(self.layers):
            self.block(layer)

    @property
    def layers(self) -> int:
        """Number of blocks; the residual stream has layers 0..layers."""
        return len(self.mixers)

    @property
    def period(self) -> int:
        """Number of blocks after which the configs of blocks repeat; `scan` compiles that many."""
        each = [self.block(layer) for layer in range(self.layers)]
        sizes = (size for size in range(1, self.layers + 1) if self.layers % size == 0)
        return next(size for size in sizes if each == each[:size] * (self.layers // size))

    def mixer_config(self, layer: int) -> Any:
        """Config of the mixer of a block."""
        mixer = self.mixers[layer]
        if not isinstance(mixer, str):
            mixer_of(mixer)
            return mixer
        if mixer not in MIXERS:
            raise ValueError(f"BackboneConfig: mixer {mixer!r} is unknown, expected one of {sorted(MIXERS)}")
        causal = self.causal[layer] if isinstance(self.causal, tuple) else self.causal
        return MIXERS[mixer].config(self.width, self.attention_heads, self.init_scale, self.context, causal)

    def block(self, layer: int) -> BlockConfig:
        """Config of a block."""
        return BlockConfig(
            mixer_config=self.mixer_config(layer),
            width=self.width,
            mlp=self.mlp,
            activation=self.activation,
            norm=self.norm,
            epsilon=self.epsilon,
            output_bias=self.output_bias,
            conditioning=self.conditioning,
            init_scale=self.init_scale,
            row_chunk=self.row_chunk,
        )

    def check_layer(self, layer: int) -> None:
        """Raise ValueError where the residual stream has no such layer."""
        if not 0 <= layer <= self.layers:
            raise ValueError(f"layer is {layer}, expected 0 (the embedding) to {self.layers} (the last block)")
