"""The tensors of a run by name: model, optimizer, random generators; each rank gives its part and takes its part."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hjepa_train.checkpoint.tensors import SavedTensors
from hjepa_train.errors import CheckpointError
from hjepa_train.parallel import World

MODEL, OPTIMIZER, GENERATOR = "model", "optimizer", "generator"


def model_shapes(module: nn.Module) -> dict[str, list[int]]:
    """Return the name and whole shape of every tensor of the module: what tells one model from another."""
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def run_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the tensors of model and optimizer by name, as they lie on this rank, sharing their memory."""
    return {name: tensor.detach() for name, tensor in _named_state(module, optimizer)}


def of_rank(name: str, world: World) -> str:
    """Return the name of a tensor as this rank has it, where that of the main rank has the name itself."""
    return f"rank/{world.rank}/{name}"


def generator_states(world: World) -> dict[str, Tensor]:
    """Return the states of this rank's random generators by name."""
    return {f"{GENERATOR}/{device}/{world.rank}": state for device, state in _generator_states(world).items()}


def restore(module: nn.Module, optimizer: torch.optim.Optimizer, world: World, saved: SavedTensors) -> None:
    """Put saved tensors back, whatever the number of ranks that saved them; the model's names are checked before.

    Raises:
        CheckpointError: Where the optimizer's state is of other parameters.
    """
    for name, tensor in module.state_dict().items():
        common, own = f"{MODEL}/{name}", of_rank(f"{MODEL}/{name}", world)
        saved.copy_to(own if own in saved.shapes else common, tensor)
    _restore_optimizer(module, optimizer, saved)
    _restore_generators(world, saved)


def _named_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in module.state_dict().items():
        yield f"{MODEL}/{name}", tensor
    for name, parameter in module.named_parameters():
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            yield f"{OPTIMIZER}/{name}/{key}", value


def _restore_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, saved: SavedTensors) -> None:
    names = {parameter: name for name, parameter in module.named_parameters()}
    by_parameter: dict[str, list[str]] = {}
    for name in saved:
        if name.startswith(f"{OPTIMIZER}/"):
            by_parameter.setdefault(name.removeprefix(f"{OPTIMIZER}/").rpartition("/")[0], []).append(name)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {}
    for index, parameter in enumerate(parameters):
        # A parameter that has had no gradient yet (a level that a curriculum adds later) has no state.
        keys = by_parameter.pop(names[parameter], [])
        if keys:
            states[index] = {key.rpartition("/")[2]: _moment(parameter, key, saved) for key in keys}
    if by_parameter:
        first = ", ".join(sorted(by_parameter)[:3])
        raise CheckpointError(f"optimizer state of {len(by_parameter)} frozen or unknown parameters: {first}")
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _moment(parameter: Tensor, name: str, saved: SavedTensors) -> Tensor:
    # Running means have the shape of their parameter; the step count is a scalar that is never sharded.
    if tuple(saved.shapes[name]) != tuple(parameter.shape):
        return saved[name].clone()
    moment = torch.empty_like(parameter, requires_grad=False)
    saved.copy_to(name, moment)
    return moment


def _generator_states(world: World) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(world.device)
    return states


def _restore_generators(world: World, saved: SavedTensors) -> None:
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
