"""The tensors of a run by name: model, optimizer, random generators; whole on the way out, sharded on the way in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from hjepa_train.errors import CheckpointError
from hjepa_train.parallel import World
from hjepa_train.sharded import placed_like, whole

MODEL, OPTIMIZER, GENERATOR = "model", "optimizer", "generator"


def model_shapes(module: nn.Module) -> dict[str, list[int]]:
    """Return the name and whole shape of every tensor of the module: what tells one model from another."""
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def collect(module: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> dict[str, Tensor]:
    """Gather the run's tensors on the CPU of the main rank; all ranks call it, the others get nothing."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in _named_state(module, optimizer):
        value = whole(tensor)
        if world.is_main:
            copy = value.detach().cpu().contiguous()
            # A tied tensor has two names and one storage, which safetensors refuses.
            tensors[name] = copy.clone() if copy.data_ptr() in seen else copy
            seen.add(copy.data_ptr())
    for device, state in _generator_states(world).items():
        every = world.gather(state.to(world.control_device)[None]).cpu()
        tensors |= {f"{GENERATOR}/{device}/{rank}": row.clone() for rank, row in enumerate(every) if world.is_main}
    return tensors


def restore(module: nn.Module, optimizer: torch.optim.Optimizer, world: World, saved: Mapping[str, Tensor]) -> None:
    """Put saved tensors back, whatever the number of ranks that saved them; the model's names are checked before.

    Raises:
        CheckpointError: Where the optimizer's state is of other parameters.
    """
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.copy_(placed_like(tensor, saved[f"{MODEL}/{name}"]))
    _restore_optimizer(module, optimizer, saved)
    _restore_generators(world, saved)


def _named_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in module.state_dict().items():
        yield f"{MODEL}/{name}", tensor
    for name, parameter in module.named_parameters():
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            yield f"{OPTIMIZER}/{name}/{key}", value


def _restore_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]) -> None:
    names = {parameter: name for name, parameter in module.named_parameters()}
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for name, tensor in saved.items():
        if name.startswith(f"{OPTIMIZER}/"):
            parameter_name, _, key = name.removeprefix(f"{OPTIMIZER}/").rpartition("/")
            by_parameter.setdefault(parameter_name, {})[key] = tensor
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {}
    for index, parameter in enumerate(parameters):
        # A parameter that has had no gradient yet (a level that a curriculum adds later) has no state.
        values = by_parameter.pop(names[parameter], {})
        if values:
            states[index] = {key: _moment(parameter, value) for key, value in values.items()}
    if by_parameter:
        first = ", ".join(sorted(by_parameter)[:3])
        raise CheckpointError(f"optimizer state of {len(by_parameter)} frozen or unknown parameters: {first}")
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _moment(parameter: Tensor, saved: Tensor) -> Tensor:
    # Running means have the shape of their parameter; the step count is a scalar that is never sharded.
    return placed_like(parameter, saved) if saved.shape == parameter.shape else saved.clone()


def _generator_states(world: World) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(world.device)
    return states


def _restore_generators(world: World, saved: Mapping[str, Tensor]) -> None:
    for device in _generator_states(world):
        own = saved.get(f"{GENERATOR}/{device}/{world.rank}")
        if own is None:
            # More ranks than before, or another device: a new generator, still a function of what was saved.
            origin = bytes(saved[f"{GENERATOR}/cpu/0"].tolist()) + f"{device} {world.rank}".encode()
            seed = int.from_bytes(hashlib.sha256(origin).digest()[:7], "big")
            own = _seeded(device, world, seed)
        if device == "cuda":
            torch.cuda.set_rng_state(own, world.device)
        else:
            torch.set_rng_state(own)


def _seeded(device: str, world: World, seed: int) -> Tensor:
    return torch.Generator(world.device if device == "cuda" else "cpu").manual_seed(seed).get_state()
