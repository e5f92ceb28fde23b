"""The hybrid state: a recurrent state-space model, deterministic and stochastic, and its latent overshooting."""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hjepa_models._validation import check_not_negative, check_positive
from hjepa_models.initialization import construct, initialize
from hjepa_models.objectives.kl import KLBalance, dynamics_kl, kl_balance
from hjepa_models.objectives.overshooting import check_distance
from hjepa_models.random import fold_in, gumbel, row_seeds


class _Stream(IntEnum):
    """Keeps the draws of one seed apart, so that a rollout and what is compared with it never share their noise."""

    observe = 0
    imagine = 1
    overshoot = 2


@dataclass(kw_only=True, slots=True)
class StateConfig:
    """Describes a hybrid state and what trains it.

    Attributes:
        recurrent_dim: width H of the deterministic part.
        hidden_dim: width of the hidden layer of each map.
        num_groups: number G of categoricals in the stochastic part.
        num_classes: classes C of each.
        unimix: share of the uniform law that is mixed into every categorical, so that none becomes certain.
        temperature: of the Gumbel softmax whose gradient a sample has.
        free_bits: nats of divergence that cost nothing.
        dynamics: weight of the divergence that trains the prior.
        representation: weight of the divergence that trains the posterior.
        overshooting: number D of steps that the prior is rolled on for its divergence, at most the whole sequence; 1 is
            the plain model.
        discount: factor of the weight from one distance of overshooting to the next.
    """

    recurrent_dim: int = 256
    hidden_dim: int = 256
    num_groups: int = 32
    num_classes: int = 32
    unimix: float = 0.01
    temperature: float = 1.0
    free_bits: float = 1.0
    dynamics: float = 0.5
    representation: float = 0.1
    overshooting: int = 1
    discount: float = 0.9

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        check_positive(
            recurrent_dim=self.recurrent_dim,
            hidden_dim=self.hidden_dim,
            num_groups=self.num_groups,
            temperature=self.temperature,
            overshooting=self.overshooting,
        )
        check_not_negative(free_bits=self.free_bits, dynamics=self.dynamics, representation=self.representation)
        if self.num_classes < 2:
            raise ValueError(
                f"num_classes={self.num_classes}: one class says nothing; allowed: 2 and more; use e.g. 32"
            )
        if not 0 <= self.unimix < 1:
            raise ValueError(
                f"unimix={self.unimix}: no share that leaves the network a say; allowed: 0 <= unimix < 1; use e.g. 0.01"
            )
        if not 0 < self.discount <= 1:
            raise ValueError(f"discount={self.discount}: not a discount; allowed: 0 < discount <= 1; use e.g. 0.9")

    def build(
        self,
        action_dim: int,
        embed_dim: int,
        *,
        context_dim: int = 0,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> "HybridState":
        """Return the state for actions and embeddings of these widths, its weights drawn from `seed`."""
        return construct(lambda: HybridState(self, action_dim, embed_dim, context_dim), seed, device)


class State(NamedTuple):
    """What is known after a step.

    Attributes:
        h: the deterministic part.
        z: the stochastic part, G one-hot vectors side by side; all zero before the first step.
    """

    h: Float[Tensor, "*B H"]
    z: Float[Tensor, "*B S"]

    @property
    def features(self) -> Float[Tensor, "*B F"]:
        """Both parts side by side."""
        return torch.cat([self.h, self.z], dim=-1)


class Imagination(NamedTuple):
    """The states of steps that were not seen.

    Attributes:
        h: deterministic parts.
        z: stochastic parts, drawn from the prior.
        prior_logits: log-probabilities that they were drawn from.
    """

    h: Float[Tensor, "B T H"]
    z: Float[Tensor, "B T S"]
    prior_logits: Float[Tensor, "B T G C"]

    @property
    def features(self) -> Float[Tensor, "B T F"]:
        """Both parts side by side."""
        return torch.cat([self.h, self.z], dim=-1)


class Rollout(NamedTuple):
    """The states of steps that were seen.

    Attributes:
        start: the state before the first step.
        h: deterministic parts.
        z: stochastic parts, drawn from the posterior.
        posterior_logits: log-probabilities given the embedding of the step.
        prior_logits: log-probabilities without it.
    """

    start: State
    h: Float[Tensor, "B T H"]
    z: Float[Tensor, "B T S"]
    posterior_logits: Float[Tensor, "B T G C"]
    prior_logits: Float[Tensor, "B T G C"]

    @property
    def features(self) -> Float[Tensor, "B T F"]:
        """Both parts side by side."""
        return torch.cat([self.h, self.z], dim=-1)

    @property
    def previous(self) -> State:
        """The state before each step."""
        return State(
            torch.cat([self.start.h.unsqueeze(1), self.h[:, :-1]], dim=1),
            torch.cat([self.start.z.unsqueeze(1), self.z[:, :-1]], dim=1),
        )


def straight_through_sample(
    logits: Float[Tensor, "*B G C"], noise: Float[Tensor, "*B G C"] | None, temperature: float = 1.0
) -> Float[Tensor, "*B G C"]:
    r"""Return one-hot vectors with the gradient of a softmax.

    Forward $\mathrm{onehot}(\arg\max_c (l_c + g_c))$, backward the gradient of $\mathrm{softmax}((l + g) / \tau)$.

    Args:
        logits: l.
        noise: g, standard Gumbel numbers, which make the vectors samples of softmax(l); None gives the mode.
        temperature: τ; a small one makes the gradient sharp, and rare.

    Returns:
        Exactly one-hot vectors in the dtype of the logits.

    Source:
        Jang et al. 2017 (Gumbel-softmax, arXiv 1611.01144), section 2.2.
    """
    perturbed = logits if noise is None else logits + noise.to(logits.dtype)
    soft = (perturbed / temperature).softmax(-1)
    classes = torch.arange(logits.shape[-1], device=logits.device)
    hard = (perturbed.argmax(-1, keepdim=True) == classes).to(soft.dtype)
    # The bracket is exactly 0, so that rounding never reaches the one-hot vector.
    return hard + (soft - soft.detach())


class HybridState(nn.Module):
    r"""Recurrent state-space model over a sequence of actions and embeddings.

    $$h_t = f(h_{t-1}, z_{t-1}, a_t), \qquad p(z_t | h_t), \qquad q(z_t | h_t, e_t)$$

    Action t leads *into* step t: it is what is known of the step (where it lies, what was done) before its embedding
    is. The prior p foresees the step, the posterior q has seen it. In evaluation the stochastic part is the mode. The
    sequence may be the steps of a clip or the blocks of an image.

    Args:
        config: the configuration.
        action_dim: width A of an action.
        embed_dim: width E of an embedding.
        context_dim: width of what the first state may be made from; 0 means it is the same for all rows.

    Source:
        Hafner et al. 2019 (PlaNet, arXiv 1811.04551), section 3; categoricals, mixed with a uniform law, and the
        layer-normed recurrent unit of Hafner et al. 2023 (DreamerV3, arXiv 2301.04104), whose gradient of a sample is
        that of the plain softmax; here that of the Gumbel softmax.
    """

    def __init__(self, config: StateConfig, action_dim: int, embed_dim: int, context_dim: int = 0) -> None:
        super().__init__()
        check_positive(action_dim=action_dim, embed_dim=embed_dim)
        check_not_negative(context_dim=context_dim)
        self.config = config
        recurrent, hidden = config.recurrent_dim, config.hidden_dim
        stochastic_dim = config.num_groups * config.num_classes
        self.initial_h = nn.Parameter(torch.empty(recurrent))
        self.context = nn.Linear(context_dim, recurrent, bias=False) if context_dim else None
        self.input = nn.Sequential(nn.Linear(stochastic_dim + action_dim, hidden), nn.LayerNorm(hidden), nn.SiLU())
        self.gates = nn.Sequential(
            nn.Linear(hidden + recurrent, 3 * recurrent, bias=False), nn.LayerNorm(3 * recurrent)
        )
        self.prior_head = _head(recurrent, hidden, stochastic_dim)
        self.posterior_head = _head(recurrent + embed_dim, hidden, stochastic_dim)

    @property
    def feature_dim(self) -> int:
        """Width F of the features: both parts side by side."""
        return self.config.recurrent_dim + self.config.num_groups * self.config.num_classes

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill every parameter from a CPU generator."""
        initialize(self, generator, fan_in=True)
        nn.init.zeros_(self.initial_h)

    def initial(self, batch: int, context: Float[Tensor, "B X"] | None = None) -> State:
        """Return the state before the first step.

        Args:
            batch: rows.
            context: what is known of each row at the start, where the module was built with a `context_dim`.

        Returns:
            A deterministic part in (-1, 1), and zeros.

        Raises:
            ValueError: for a context that the module was not built for, or none where it was.
        """
        if (context is None) != (self.context is None):
            given, wanted = ("a context", 0) if self.context is None else ("no context", self.context.in_features)
            raise ValueError(
                f"context_dim={wanted}: {given} was given; allowed: a context exactly where context_dim > 0; "
                "pass or leave out `context`, or build with another context_dim"
            )
        h = self.initial_h.expand(batch, -1)
        if self.context is not None:
            h = h + self.context(context).to(h.dtype)
        h = h.tanh()
        return State(h, h.new_zeros(batch, self.config.num_groups * self.config.num_classes))

    def advance(self, state: State, action: Float[Tensor, "*B A"]) -> Float[Tensor, "*B H"]:
        r"""Return the next deterministic part.

        With $r, c, u$ the thirds of the layer-normed map of $[x, h]$: $\sigma(u - 1) \tanh(\sigma(r) c) + (1 -
        \sigma(u - 1)) h$, so that at first the state mostly stays.

        Args:
            state: the state before the step.
            action: what leads into the step.

        Returns:
            h of the step.
        """
        h = state.h
        x = self.input(torch.cat([state.z, action.to(h.dtype)], dim=-1))
        reset, candidate, update = self.gates(torch.cat([x.to(h.dtype), h], dim=-1)).to(h.dtype).chunk(3, dim=-1)
        update = torch.sigmoid(update - 1)
        new: Tensor = update * torch.tanh(torch.sigmoid(reset) * candidate) + (1 - update) * h
        return new

    def prior(self, h: Float[Tensor, "*B H"]) -> Float[Tensor, "*B G C"]:
        """Return the log-probabilities of the stochastic part that are foreseen, float32 at least."""
        return self._log_probabilities(self.prior_head(h))

    def posterior(self, h: Float[Tensor, "*B H"], embedding: Float[Tensor, "*B E"]) -> Float[Tensor, "*B G C"]:
        """Return the log-probabilities of the stochastic part once the embedding of the step is seen."""
        return self._log_probabilities(self.posterior_head(torch.cat([h, embedding.to(h.dtype)], dim=-1)))

    def forward(
        self,
        actions: Float[Tensor, "B T A"],
        embeddings: Float[Tensor, "B T E"],
        seed: int | Int[Tensor, "*R"],
        state: State | None = None,
    ) -> Rollout:
        """Do the same as `observe`, so that hooks of the module see it."""
        return self.observe(actions, embeddings, seed, state)

    def observe(
        self,
        actions: Float[Tensor, "B T A"],
        embeddings: Float[Tensor, "B T E"],
        seed: int | Int[Tensor, "*R"],
        state: State | None = None,
    ) -> Rollout:
        """Follow a sequence whose embeddings are seen.

        Args:
            actions: what leads into each step.
            embeddings: what is seen there.
            seed: of the noise, e.g. the training step; the noise of a step is a pure function of the seed, the step's
                place and the row's place in the batch of all processes, or of the step's place and the row's own seed
                where each has one (`row_seeds`). A tensor never makes a compiled program compile anew, on whatever
                device it lies.
            state: the state before the first step; None means `initial`.

        Returns:
            The states and both laws of every step.

        Raises:
            ValueError: for no step, or not one action for each embedding.
        """
        if actions.shape[:2] != embeddings.shape[:2] or not actions.shape[1]:
            raise ValueError(
                f"actions and embeddings of shapes {tuple(actions.shape)} and {tuple(embeddings.shape)}: do not belong "
                "to one sequence; allowed: [rows, steps, width], rows and steps alike, 1 step or more; give one action "
                "for each embedding"
            )
        start = self.initial(len(actions)) if state is None else state
        keys = self._keys(seed, _Stream.observe, len(actions), actions.device)
        h, z, posterior_logits = self._follow(start, actions, keys, self.training, embeddings)
        return Rollout(start, h, z, posterior_logits, self.prior(h))

    def imagine(
        self,
        state: State,
        actions: Float[Tensor, "B T A"],
        seed: int | Int[Tensor, "*R"],
        *,
        sample: bool | None = None,
    ) -> Imagination:
        """Go on from a state without seeing anything.

        Args:
            state: the state before the first step.
            actions: what leads into each step.
            seed: of the noise, as in `observe`; the same seed gives other noise there.
            sample: draw the stochastic part, or take its mode; None means to draw in training only.

        Returns:
            The states and the prior of every step.
        """
        keys = self._keys(seed, _Stream.imagine, len(actions), actions.device)
        return Imagination(*self._follow(state, actions, keys, self.training if sample is None else sample))

    def loss(self, rollout: Rollout, actions: Float[Tensor, "B T A"], seed: int | Int[Tensor, "*R"]) -> KLBalance:
        r"""Return what trains prior and posterior: `kl_balance`, its dynamics term overshot where the config says so.

        Args:
            rollout: what `observe` gave.
            actions: the actions that it was given.
            seed: the seed that it was given.

        Returns:
            The weighted loss, and the plain one-step divergence to watch.
        """
        config = self.config
        laws = rollout.posterior_logits, rollout.prior_logits
        distance = min(config.overshooting, actions.shape[1])
        if distance == 1:
            return kl_balance(*laws, config.free_bits, config.dynamics, config.representation)
        rest = kl_balance(*laws, config.free_bits, 0.0, config.representation)
        overshot = latent_overshooting(self, rollout, actions, distance, config.discount, config.free_bits, seed)
        return KLBalance(rest.loss + config.dynamics * overshot, rest.kl)

    def _follow(
        self, state: State, actions: Tensor, keys: Tensor, draw: bool, embeddings: Tensor | None = None
    ) -> tuple[Float[Tensor, "B T H"], Float[Tensor, "B T S"], Float[Tensor, "B T G C"]]:
        """Return the states and the laws that they were drawn from: the posterior where there are embeddings."""
        h, z = state
        recurrent, stochastic, laws = [], [], []
        for step in range(actions.shape[1]):
            h = self.advance(State(h, z), actions[:, step])
            logits = self.prior(h) if embeddings is None else self.posterior(h, embeddings[:, step])
            z = self._sample(logits, keys, step, draw).to(h.dtype)
            recurrent.append(h)
            stochastic.append(z)
            laws.append(logits)
        return torch.stack(recurrent, dim=1), torch.stack(stochastic, dim=1), torch.stack(laws, dim=1)

    def _log_probabilities(self, out: Float[Tensor, "*B S"]) -> Float[Tensor, "*B G C"]:
        config = self.config
        logits = out.to(torch.promote_types(out.dtype, torch.float32))
        logits = logits.reshape(*out.shape[:-1], config.num_groups, config.num_classes)
        if config.unimix == 0:
            return logits.log_softmax(-1)
        return ((1 - config.unimix) * logits.softmax(-1) + config.unimix / config.num_classes).log()

    def _keys(self, seed: int | Tensor, stream: _Stream, batch: int, device: torch.device) -> Int[Tensor, " B"]:
        return fold_in(row_seeds(seed, batch, device), int(stream))

    def _sample(
        self, logits: Float[Tensor, "*B G C"], keys: Int[Tensor, "*B"], step: int, draw: bool
    ) -> Float[Tensor, "*B S"]:
        noise = gumbel(fold_in(keys, step, keys.device), (*logits.shape[-2:],), logits.device) if draw else None
        return straight_through_sample(logits, noise, self.config.temperature).flatten(-2)


def latent_overshooting(
    module: HybridState,
    rollout: Rollout,
    actions: Float[Tensor, "B T A"],
    distance: int,
    discount: float = 1.0,
    free_bits: float = 1.0,
    seed: int | Int[Tensor, "*R"] = 0,
) -> Float[Tensor, ""]:
    r"""Divergence of the prior that is rolled on for 1 to D steps from the posterior states.

    $$\frac1D \sum_{d=1}^{D} \gamma^{d-1}\, \underset{t}{\mathrm{mean}}\,
    \max(f, \mathrm{KL}[sg(q(z_{t+d})) \| p(z_{t+d} | s_t)])$$

    over every start t from the state before the first step on. Targets get no gradient; the rolled states, drawn from
    the prior, and the states that they start from do. D = 1 is `dynamics_kl` of the rollout.

    Args:
        module: the model.
        rollout: what it observed.
        actions: the actions of the rollout.
        distance: D, at most T.
        discount: γ.
        free_bits: f in nats.
        seed: of the draws, as in `observe`; the noise is a pure function of seed, row, start and distance.

    Returns:
        The unweighted loss.

    Raises:
        ValueError: for a distance beyond the sequence.

    Source:
        Hafner et al. 2019 (PlaNet, arXiv 1811.04551), section 4, the divergence of equation 7 with $\beta_d =
        \gamma^{d-1}$ (equal there), one draw for each expectation, and the posterior held fixed at d = 1 as well.
    """
    batch, steps = actions.shape[:2]
    check_distance(distance, steps)
    rows = module._keys(seed, _Stream.overshoot, batch, actions.device)
    keys = fold_in(rows.unsqueeze(1), torch.arange(steps, device=actions.device))
    h, z = rollout.previous
    terms = []
    for ahead in range(distance):
        starts = steps - ahead
        h = module.advance(State(h[:, :starts], z[:, :starts]), actions[:, ahead:])
        prior = module.prior(h)
        terms.append(discount**ahead * dynamics_kl(rollout.posterior_logits[:, ahead:], prior, free_bits))
        if ahead < distance - 1:
            z = module._sample(prior, keys[:, :starts], ahead, module.training).to(h.dtype)
    return torch.stack(terms).mean()


def _head(wide: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(wide, hidden), nn.LayerNorm(hidden), nn.SiLU(), nn.Linear(hidden, out))
