"""Features of the blocks of any module, by forward hooks: one pass for all blocks and poolings that are asked for."""

import re
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hjepa_eval.extraction.features import FeatureName


class TokenPooling(StrEnum):
    """How the tokens of an image become one vector."""

    mean = "mean"
    """Mean of the patch tokens; class and register tokens are left out."""
    cls = "cls"
    """The first token, which must be a class token."""
    concat = "concat"
    """Class token and mean of the patch tokens, side by side: twice as wide."""


def patch_tokens(output: Tensor, num_prefix_tokens: int = 0) -> Float[Tensor, "B N D"]:
    """Patch tokens of a block's output: [B, N, D] without its prefix, a map [B, D, H, W] with its places in a row.

    Args:
        output: Tokens [B, N, D] or a map [B, D, H, W], channels first.
        num_prefix_tokens: Class and register tokens ahead of the patches.

    Returns:
        The patch tokens.

    Raises:
        ValueError: For another shape.
    """
    if output.ndim == 4:
        return output.flatten(2).transpose(1, 2)
    if output.ndim != 3 or output.shape[1] <= num_prefix_tokens:
        raise ValueError(
            f"output of shape {tuple(output.shape)} with num_prefix_tokens={num_prefix_tokens}: a block must give "
            "tokens [B, N, D] beyond the prefix, or a map [B, D, H, W]; name another block"
        )
    return output[:, num_prefix_tokens:]


def pool_tokens(output: Tensor, pooling: TokenPooling | str, num_prefix_tokens: int = 0) -> Float[Tensor, "B D"]:
    """One vector an image from the output of a block.

    Args:
        output: Tokens [B, N, D] or a map [B, D, H, W]; under `mean` also vectors [B, D], which stay as they are.
        pooling: mean, cls or concat.
        num_prefix_tokens: Class and register tokens ahead of the patches.

    Returns:
        The vectors; `concat` gives 2 D.

    Raises:
        ValueError: Where the output has no class token and one is asked for.
    """
    _check_pooling(pooling)
    if pooling == TokenPooling.mean:
        return output if output.ndim == 2 else patch_tokens(output, num_prefix_tokens).mean(dim=1)
    if output.ndim != 3 or num_prefix_tokens < 1:
        raise ValueError(
            f"pooling={pooling}: output of shape {tuple(output.shape)} with num_prefix_tokens={num_prefix_tokens} has "
            "no class token; allowed: mean; or say how many tokens stand ahead of the patches"
        )
    if pooling == TokenPooling.cls:
        return output[:, 0]
    return torch.cat((output[:, 0], patch_tokens(output, num_prefix_tokens).mean(dim=1)), dim=1)


class BlockFeatures:
    """A feature function for ``extract``: the outputs of some blocks, each under every pooling, from one forward pass.

    Args:
        module: Any module that maps images to something.
        blocks: Which blocks: numbers into the list of blocks (-1 the last) or names of submodules; "output" is what the
            module returns.
        poolings: How tokens become vectors. What is a vector already stays as it is, under the pooling "none".
        num_prefix_tokens: Class and register tokens ahead of the patches; None: what the module says by an attribute of
            that name, as timm's do, else 0, and blocks with some tokens more than the output are refused. An output
            that has as many tokens less than the blocks lost them already; one that has as many tokens as
            ``patch_embed.num_patches`` has none.
        norm: Apply the final norm (the ``norm`` beside the list of blocks) to the tokens of numbered blocks, as linear
            probes of vision transformers do; the last block with it is the encoder's own output.
        channels_last: Maps of blocks are [B, H, W, D]; None: what the module says by ``output_fmt``, as timm's do, else
            they are [B, D, H, W].
        levels: A feature function of the same module that runs these blocks, as ``level_features(model)``: its pass is
            the one, and its features come as well.

    Raises:
        ValueError: Where there is no such block or pooling, or no list of blocks.
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: Sequence[int | str] = ("output",),
        poolings: Sequence[TokenPooling | str] = (TokenPooling.mean,),
        *,
        num_prefix_tokens: int | None = None,
        norm: bool = False,
        channels_last: bool | None = None,
        levels: Callable[[Tensor], Mapping[FeatureName, Tensor]] | None = None,
    ) -> None:
        if levels is not None and "output" in blocks:
            raise ValueError("blocks='output': with levels there is none; the levels come anyway, leave it out")
        if not blocks or not poolings:
            raise ValueError(f"blocks={tuple(blocks)} poolings={tuple(poolings)}: at least one of each")
        for pooling in poolings:
            _check_pooling(pooling)
        self.module = module
        self._levels = levels
        self.poolings = tuple(poolings)
        # DistributedDataParallel shows nothing of what it wraps.
        said_by = getattr(module, "module", module)
        found = getattr(said_by, "num_prefix_tokens", None) if num_prefix_tokens is None else num_prefix_tokens
        self._prefix_is_known = found is not None
        self.num_prefix_tokens = int(found or 0)
        counted = getattr(getattr(said_by, "patch_embed", None), "num_patches", None)
        self._num_patches = counted if num_prefix_tokens is None else None
        said = getattr(said_by, "output_fmt", None) == "NHWC"
        self.channels_last = said if channels_last is None else channels_last
        self._norm = _final_norm(module) if norm else nn.Identity()
        self._order: list[str] = []
        self._numbered: set[str] = set()
        self._hooked: dict[str, nn.Module] = {}
        self._wants_output = False
        listed = find_blocks(module) if any(isinstance(block, int) for block in blocks) else []
        for block in dict.fromkeys(blocks):
            if block == "output":
                self._order.append(block)
                self._wants_output = True
            elif isinstance(block, int):
                if not -len(listed) <= block < len(listed):
                    raise ValueError(f"blocks={block}: the module has {len(listed)} blocks; allowed: -n to n - 1")
                label = f"block{block % len(listed)}"
                self._hooked[label] = listed[block]
                self._numbered.add(label)
                self._order.append(label)
            else:
                self._hooked[block] = _submodule(module, block)
                self._order.append(block)

    def __call__(self, images: Tensor) -> dict[FeatureName, Tensor]:
        """Map images [B, ...] to features [B, D] for each block and pooling, and of each level."""
        caught: dict[str, Tensor] = {}
        handles = [part.register_forward_hook(self._hook(caught, label)) for label, part in self._hooked.items()]
        output, pooled = None, {}
        try:
            if self._levels is None:
                output = self.module(images)
            else:
                pooled = dict(self._levels(images))
        finally:
            for handle in handles:
                handle.remove()
        if self._wants_output:
            caught["output"] = _tensor(output, "output")
        missing = [label for label in self._hooked if label not in caught]
        if missing:
            raise ValueError(f"blocks={missing}: the forward pass does not run them; name others")
        if not self._prefix_is_known:
            self._check_counts(caught, output)
        for label in self._order:
            tokens = self._norm(caught[label]) if label in self._numbered else caught[label]
            if tokens.ndim == 4 and self.channels_last:
                tokens = tokens.movedim(-1, 1)
            if tokens.ndim == 2:
                pooled[FeatureName(level=label, pooling="none")] = tokens
                continue
            for pooling in self.poolings:
                name = FeatureName(level=label, pooling=str(pooling))
                pooled[name] = pool_tokens(tokens, pooling, self._prefix_of(label, caught))
        return pooled

    def _check_counts(self, caught: Mapping[str, Tensor], output: object) -> None:
        """Refuse blocks with some tokens more than the output: registers would be averaged with the patches."""
        left = output.shape[1] if isinstance(output, Tensor) and output.ndim == 3 else 0
        for label, part in caught.items():
            more = part.shape[1] - left
            if part.ndim == 3 and 0 < more < left:  # stages with fewer tokens have half of them at most
                raise ValueError(
                    f"blocks={label}: {part.shape[1]} tokens, of which the module returns {left}; give "
                    f"num_prefix_tokens={more} if class or register tokens stand ahead of the patches, else 0"
                )

    def _prefix_of(self, label: str, caught: Mapping[str, Tensor]) -> int:
        # CaiT and XCiT join the class token behind their blocks.
        if caught[label].shape[1] == self._num_patches:
            return 0
        counts = {part.shape[1] for name, part in caught.items() if name != "output" and part.ndim == 3}
        output = caught.get("output")
        stripped = output is not None and output.ndim == 3 and output.shape[1] + self.num_prefix_tokens in counts
        return 0 if stripped and label == "output" else self.num_prefix_tokens

    def _hook(self, caught: dict[str, Tensor], label: str) -> Callable[[nn.Module, object, object], None]:
        def keep(_module: nn.Module, _inputs: object, output: object) -> None:
            caught[label] = _tensor(output, label)

        return keep


def find_blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks of a network: the children of the first submodule that is called ``blocks`` or ``layers``.

    Where that lies in a numbered stage (stages.0.blocks), the blocks of its other stages follow; where ``layers`` are
    stages (layers.0.blocks, as Swin's are), the blocks are theirs.

    Args:
        module: A timm-like encoder, or what holds one.

    Returns:
        The blocks, in order.

    Raises:
        ValueError: Where there is no such list.
    """
    return [block for blocks in _block_lists(module).values() for block in blocks]


def _check_pooling(pooling: TokenPooling | str) -> None:
    if pooling not in list(TokenPooling):
        raise ValueError(f"pooling={pooling!r}: no such pooling; allowed: {', '.join(TokenPooling)}; mean is usual")


def _block_lists(module: nn.Module) -> dict[str, nn.ModuleList | nn.Sequential]:
    lists = {
        name: part
        for name, part in module.named_modules()
        if name.rpartition(".")[2] in {"blocks", "layers"} and isinstance(part, nn.ModuleList | nn.Sequential)
    }
    if not lists:
        raise ValueError(
            f"blocks: {type(module).__name__} has no list called blocks or layers; give names of submodules instead"
        )
    first = next(iter(lists))
    if first.rpartition(".")[2] == "layers":
        inner = re.compile(re.escape(first) + r"\.\d+\.blocks")
        first = next(filter(inner.fullmatch, lists), first)
    stages = re.compile(r"\.".join(r"\d+" if word.isdigit() else re.escape(word) for word in first.split(".")))
    return {name: part for name, part in lists.items() if stages.fullmatch(name)}


def _final_norm(module: nn.Module) -> nn.Module:
    owner = next(iter(_block_lists(module))).rpartition(".")[0]
    outer = re.sub(r"(^|\.)[^.]+\.\d+$", "", owner)  # of a stage
    norms = (getattr(module.get_submodule(name), "norm", None) for name in (owner, outer))
    norm = next((found for found in norms if found is not None), None)
    if not isinstance(norm, nn.Module):
        raise ValueError(f"norm=True: {type(module).__name__} has no norm beside its blocks; leave it out")
    return norm


def _submodule(module: nn.Module, path: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError:
        known = ", ".join(name for name, _ in module.named_children())
        raise ValueError(f"blocks={path!r}: no such submodule; allowed: 'output' or a path under {known}") from None


def _tensor(output: object, label: str) -> Tensor:
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise ValueError(f"blocks={label}: it gives {type(output).__name__}, no tensor; name another block")
    return output
