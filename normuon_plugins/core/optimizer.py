"""NorMuon: orthogonalized momentum with one step size per neuron, and AdamW for everything else, in one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim.optimizer import Optimizer

from normuon_plugins.core.buckets import DEFAULT_BUCKET_BYTES
from normuon_plugins.core.group_options import (
    GROUP_KEYS,
    check_group,
    check_option,
    check_parameter,
    complete_group,
    parameter_name,
)
from normuon_plugins.core.loading import check_loadable, place_state
from normuon_plugins.core.matching import match_groups
from normuon_plugins.core.metrics import (
    NeuronRecord,
    first_rates,
    neuron_metrics,
    share,
    synchronized_neuron_metrics,
)
from normuon_plugins.core.optimizer_state import check_state, prepare_state
from normuon_plugins.core.planned_model import PlannedModel, Thawed, warn_of_nothing_to_learn
from normuon_plugins.core.shared_work import STEPS_BETWEEN, SharedWork
from normuon_plugins.core.step import find_nonfinite, local_gradients, others_in_words, take_step
from normuon_plugins.core.step_plan import Member, StepPlan, plan_step, sign

# How many plans are kept: those of layers that are trained in turns, or of steps inside and outside of ``no_sync``.
KEPT_PLANS = 4


class NorMuon(Optimizer):
    r"""NorMuon for hidden weight matrices, AdamW for the rest.

    For a matrix parameter with ``m`` neurons (rows) and ``n`` inputs (columns), as in Algorithm 1 of
    https://arxiv.org/abs/2510.05491::

        M <- momentum * M + (1 - momentum) * G
        U  = momentum * M + (1 - momentum) * G     or M with nesterov=False
        O  = NewtonSchulz(U)
        v <- beta2 * v + (1 - beta2) * mean_cols(O * O)
        N  = O / (sqrt(v) + eps)
        W <- (1 - lr * weight_decay) * W - lr * scale * N

    ``plan_parameters(model).param_groups()`` gives the groups of a model; ``build_normuon(model, ...)`` does both. A
    group says ``algorithm`` (``"normuon"`` or ``"adamw"``) and, for matrices, ``layout`` (see
    ``normuon_plugins.core.layout``); a bare group is ``"normuon"`` with layout ``"o i"`` and takes 2-D parameters only.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups. Names make the error messages better.
        lr: Learning rate, a float or a one-element tensor. One tuned for AdamW is right under
            ``adjust_lr_fn="match_progress_adamw"``; docs/learning_rate.md says what the other two want.
        weight_decay: Decoupled, multiplied by ``lr``, on matrix parameters.
        momentum: Decay of the first moment, in ``[0, 1)``.
        nesterov: Look one step ahead with the same gradient. The paper's Algorithm 1 does not; its code does.
        ns_coefficients: ``"muon"``, ``"polar_express"`` or ``(a, b, c)``.
        eps: Added to ``sqrt(v)``, in units of the orthogonalized update.
        ns_steps: Newton-Schulz steps, 1 to 99.
        adjust_lr_fn: Size of the update. ``"match_rms_adamw"``: an RMS of ``0.2 * lr`` (the paper). ``"original"``:
            Muon's norm and shape factor (the authors' code). ``"match_progress_adamw"``: such that a step lowers the
            loss as AdamW's would, to first order and within a bound; ``build_normuon`` and the adapters take this one.
            Where ``q`` is a running mean of ``G * G`` over the matrix and ``r`` the RMS of ``N``, ``scale`` is then
            ``min(<U, U> / (sqrt(q) * <N, U>), max(0.2, 0.04 / (lr * sqrt(max(m, n)))) / r)``.
        beta2: Decay of the second moment of each neuron, in ``[0, 1)``.
        normalize_neurons: False is plain Muon from the same code.
        adamw_lr: Learning rate of the AdamW groups; None means ``lr``.
        adamw_betas: Betas of the AdamW groups.
        adamw_eps: Epsilon of the AdamW groups.
        adamw_weight_decay: Weight decay of AdamW groups that do not say their own.
        ns_dtype: Dtype of the products, a ``torch.dtype`` or its name; None takes bfloat16 where the device
            multiplies it fast, else float32.
        momentum_dtype: In which ``momentum_buffer`` is stored, ``"float32"``, ``"bfloat16"``, ``"int8"`` (with a scale
            for every 256 numbers of a row) or the ``torch.dtype``; None takes the parameter's own. Computing with it
            happens in float32.
        kahan_sum: Keep for every bfloat16 or float16 parameter what rounding it lost, and add it at the next step:
            small updates are not lost.
        nonfinite: What a gradient with NaN or infinity does. ``"propagate"``: as in torch. ``"skip"``: that
            parameter and its state stay as they are, counted in ``skipped_steps``. ``"raise"``:
            ``FloatingPointError`` with its name, before any write.
        bucket_bytes: Bound on the matrices that are moved or multiplied at once, in bytes of the products' dtype. The
            transient memory of a step is at most 8 times this (9 under ``"match_progress_adamw"``), or one matrix where
            that is larger.
        orthogonalize_fn: Replaces Newton-Schulz: a function from ``(batch, rows, cols)`` to a new tensor like it.
        compile: Fuse what follows Newton-Schulz (the neuron step and the rescale) by ``torch.compile``, at the first
            step.
        replicas: ``"share"``: ranks that hold the same numbers (the replicas of HSDP, or of ``process_group``) divide
            the matrices among them. ``"redundant"``: each computes all of them, without a message between replicas.
        process_group: Ranks on which plain parameters and their gradients are known to be equal (DDP); they share the
            work as above. None computes plain parameters on every rank.

    Raises:
        ValueError: If an option is out of range, or a parameter does not fit its group; the message names it.
        TypeError: If a parameter is not floating point, or complex and not on AdamW.

    Attributes:
        skipped_steps: Updates of single parameters left out so far under ``nonfinite="skip"``, in this process.

    Differences from the paper and from the authors' code:
        - ``nesterov=True`` is the authors' code's and Muon's. The paper's Algorithm 1 is ``nesterov=False``, which
          trained worse in all our runs (docs/evidence.md).
        - ``adjust_lr_fn="original"`` is the authors' scaling; the default is the paper's, and ``build_normuon``'s is
          neither: ``"match_progress_adamw"`` is ours.
        - ``p.grad`` is never written, and float32 parameters work (the authors' code writes the one and refuses the
          other).
        - Newton-Schulz divides by the largest entry of each matrix, then by its norm, without an epsilon: gradients of
          any scale keep their direction, where a norm alone under- or overflows in float32.
        - Momentum enters Newton-Schulz, and directions leave the neuron step, in ``ns_dtype``.

    Example:
        >>> weight = torch.nn.Parameter(torch.eye(2))
        >>> optimizer = NorMuon([("weight", weight)], lr=0.1, weight_decay=0.0)
        >>> weight.sum().backward()
        >>> optimizer.step()
    """

    # Without values: Fabric's wrapper inherits from this class and shows whatever the class itself has.
    skipped_steps: int
    _plans: list[StepPlan]
    _steps: int
    _planned_model: PlannedModel | None
    _shared_work: SharedWork
    _rates: dict[str, float | Tensor]
    _records: Sequence[NeuronRecord]

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: str | Sequence[float] = "muon",
        eps: float = 1e-8,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        *,
        beta2: float = 0.95,
        normalize_neurons: bool = True,
        adamw_lr: float | Tensor | None = None,
        adamw_betas: Sequence[float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        ns_dtype: torch.dtype | str | None = None,
        momentum_dtype: torch.dtype | str | None = None,
        kahan_sum: bool = False,
        nonfinite: str = "propagate",
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        orthogonalize_fn: Callable[[Tensor], Tensor] | None = None,
        compile: bool = False,
        replicas: str = "share",
        process_group: ProcessGroup | None = None,
    ) -> None:
        if isinstance(params, torch.nn.Module):
            raise TypeError(
                f"NorMuon takes parameters or groups; for a whole model, use build_normuon({type(params).__name__})."
            )
        options = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        for name, value in options.items():
            if not (name == "adamw_lr" and value is None):
                check_option(name, value)
        self._begin()
        super().__init__(params, options)

    def _begin(self) -> None:
        """Know nothing of a step, unless a step was taken."""
        self.__dict__.setdefault("skipped_steps", 0)
        self.__dict__.setdefault("_plans", [])  # the latest first
        self.__dict__.setdefault("_steps", 0)
        self.__dict__.setdefault("_planned_model", None)
        self.__dict__.setdefault("_shared_work", SharedWork())
        self.__dict__.setdefault("_rates", {})
        self.__dict__.setdefault("_records", ())

    def __getstate__(self) -> dict[str, Any]:
        # A process group belongs to its process: a copy computes on its own, which is always right.
        state = super().__getstate__()
        defaults = {**state["defaults"], "process_group": None}
        return {**state, "defaults": defaults, "skipped_steps": self.skipped_steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as in torch; missing keys take the values given to ``__init__``.

        Where the optimizer was built for a model, a group that says neither ``algorithm`` nor ``layout`` is divided by
        the plan of that model (``planned_groups``): layers that are thawed come with biases and norms.

        Raises:
            ValueError: If a value or a parameter is refused; the optimizer is then as it was.
            TypeError: If a parameter is not floating point, or complex and not on AdamW.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}.")
        known = len(self.param_groups)
        try:
            for group in self._divide(param_group):
                self._add_one_group(group)
        except (TypeError, ValueError):
            del self.param_groups[known:]
            raise

    def _divide(self, param_group: dict[str, Any]) -> list[dict[str, Any]]:
        if self._planned_model is None:
            return [param_group]
        return self._planned_model.divide(param_group, [str(group.get("name")) for group in self.param_groups])

    def _add_one_group(self, param_group: dict[str, Any]) -> None:
        group = complete_group(param_group, self.defaults)
        # Options of the optimizer that nobody would read in a group. The other algorithm's keys are let through, since
        # torch's OneCycleLR writes momentum into every group.
        foreign = sorted(param_group.keys() & self.defaults.keys() - set().union(*GROUP_KEYS.values()))
        if foreign:
            keys = sorted(GROUP_KEYS[group["algorithm"]])
            raise ValueError(
                f"a parameter group does not read {foreign}; the keys of {group['algorithm']!r} are {keys}."
            )
        own_keys = {*group, "param_names"}
        super().add_param_group(group)
        for key in group.keys() - own_keys:
            del group[key]  # torch adds every default; a group holds the keys of its own algorithm
        for index, parameter in enumerate(group["params"]):
            check_parameter(parameter, group, parameter_name(group, index))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, every tensor in the dtype in which it is stored (see ``state_specs``).

        Raises:
            ValueError: If another optimizer wrote it, or a parameter was on another algorithm or had another shape. The
                optimizer is then as it was.
        """
        loaded: list[dict[str, Any]] = []
        before = dict(self.state)
        thawed = self._thawed_in(state_dict)
        self._adopt(thawed)

        def check_and_complete(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            # torch puts the saved groups in place of ours: with every key of today, which a checkpoint of an older
            # version may lack.
            groups = match_groups(self.param_groups, saved)
            check_loadable(self.param_groups, groups, saved["state"])
            groups = [complete_group(group, self.defaults) for group in groups]
            loaded.append({**saved, "param_groups": groups})
            return {**saved, "param_groups": groups, "state": {}}

        def place(_: Optimizer) -> None:
            saved, kahan_sum = loaded[0], self.defaults["kahan_sum"]
            place_state(before, self.state, self.param_groups, saved, kahan_sum=kahan_sum)

        # After the user's own hooks have made something of the checkpoint, and before they look at the result.
        hooks = (
            self.register_load_state_dict_pre_hook(check_and_complete),
            self.register_load_state_dict_post_hook(place, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        except Exception:
            self._give_back(thawed)
            raise
        finally:
            for hook in hooks:
                hook.remove()

    def _thawed_in(self, state_dict: Mapping[str, Any]) -> list[Thawed]:
        """Return the frozen parameters of the model that a checkpoint has trained already."""
        if self._planned_model is None:
            return []
        return self._planned_model.take(
            name
            for group in state_dict["param_groups"]
            for name, number in zip(group.get("param_names", ()), group["params"], strict=False)
            if state_dict["state"].get(number)
        )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    # As torch's own zero_grad: a plan, messages and checks are nothing to trace.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step of every parameter that has a gradient, as torch does, also where it was frozen since.

        Nothing is written before all parameters and gradients of all groups were checked. State exists for every
        trainable parameter afterwards; one whose gradient is None is otherwise left alone. Under ``torch.compile`` the
        step runs as it is.

        Args:
            closure: Reevaluates the model and returns the loss; called once, first.

        Returns:
            The closure's result, else None.

        Raises:
            ValueError: If a group was edited into something that cannot be, a parameter does not fit its group, or a
                gradient is sparse; names it.
            FloatingPointError: Under ``nonfinite="raise"``; names the parameters.
            RuntimeError: If ranks that share the work hold different gradients or momenta, asked every tenth step; or
                at the first step, if the model that the optimizer was built for has lost its parameters.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._planned_model is not None:
            self._adopt(self._planned_model.check(self.param_groups, is_first_step=not self._steps))
        members = self._check_members()
        plan = self._plan_step(members)
        gradients = local_gradients(plan, members)
        if self._steps % STEPS_BETWEEN == 0:
            self._shared_work.check(plan, members, gradients, self.state)
        was_said = self._planned_model is not None and self._planned_model.has_warned
        if not gradients and not self.state and not was_said:
            warn_of_nothing_to_learn(self.param_groups)
        skipped = self._find_nonfinite(plan, members, gradients)
        prepare_state(members, self.state, kahan_sum=self.defaults["kahan_sum"])
        self._records = take_step(plan, members, gradients, self.state, skipped, self.defaults)
        self._rates = first_rates(self.param_groups)
        self._steps += 1
        return loss

    def rates(self) -> dict[str, float | Tensor]:
        """Return ``normuon/lr`` and ``adamw/lr``: those of the first group of each kind, in the last step.

        A scheduler has moved the groups on when a framework logs. Before the first step they are those of the groups.
        """
        return self._rates or first_rates(self.param_groups)

    def metrics(self, *, synchronize: bool = False) -> dict[str, float | Tensor]:
        """Return what the last step did, for a log.

        Args:
            synchronize: Without it nothing waits for a device or for other ranks: numbers about neurons are tensors of
                one element, and those of the matrices that this rank computed. With it they are floats over all
                matrices, from one collective that every rank must join.

        Returns:
            - ``normuon/lr``, ``adamw/lr``: see ``rates``;
            - ``normuon/share``: of all trainable numbers, those on NorMuon;
            - ``normuon/skipped``: ``skipped_steps``;
            - ``normuon/update_rms``: root mean square of what ``lr`` multiplied: 0.2 under ``"match_rms_adamw"``, less
              where whole matrices had no gradient; what the gradients ask for under ``"match_progress_adamw"``;
            - ``normuon/neuron_lr_min``, ``_mean``, ``_max``: effective learning rate of a neuron, ``lr`` times what its
              row of the orthogonalized update was multiplied by; zero for a neuron without an update;
            - ``normuon/neuron_spread_before``, ``_after``: standard deviation over mean of the norms of a matrix's
              neurons in the update, before and after the neuron step; a mean over matrices.

            Those after ``skipped`` exist once a matrix was stepped. One that several ranks compute, each on its own
            (plain beside tensor-parallel ones), counts as often in the means.
        """
        known = {
            **self.rates(),
            "normuon/share": share(self.param_groups),
            "normuon/skipped": float(self.skipped_steps),
        }
        if not synchronize:
            return {**known, **neuron_metrics(self._records)}
        parameter = next(parameter for group in self.param_groups for parameter in group["params"])
        floats = {name: float(value) for name, value in known.items()}
        return {**floats, **synchronized_neuron_metrics(self._records, parameter)}

    def _adopt(self, thawed: Sequence[Thawed]) -> None:
        """Put parameters into the groups of their kind, which exist since the optimizer was built."""
        groups = {group.get("name"): group for group in self.param_groups}
        for name, parameter, group in thawed:
            groups[group]["params"].append(parameter)
            groups[group].setdefault("param_names", []).append(name)

    def _give_back(self, thawed: Sequence[Thawed]) -> None:
        """Undo ``_adopt``, which put them last."""
        groups = {group.get("name"): group for group in self.param_groups}
        for _, _, group in thawed:
            groups[group]["params"].pop()
            groups[group]["param_names"].pop()
        if self._planned_model is not None:
            self._planned_model.wait({name: group for name, _, group in thawed})

    def _check_members(self) -> list[Member]:
        """Return every parameter that requires or has a gradient; raise if any of them cannot be stepped."""
        members = []
        for group in self.param_groups:
            check_group(group)
            for index, parameter in enumerate(group["params"]):
                if parameter.requires_grad or parameter.grad is not None:
                    member = Member(parameter, group, parameter_name(group, index))
                    check_parameter(*member)
                    # torch's state is a defaultdict: whoever looked at it left an empty one.
                    if state := self.state.get(parameter):
                        check_state(*member, state)
                    members.append(member)
        return members

    def _plan_step(self, members: Sequence[Member]) -> StepPlan:
        """Return the plan of an earlier step if one still holds, else a new one."""
        options = self._shared_work.options(self.defaults)
        signature = sign(members, options)
        plan = next((plan for plan in self._plans if plan.signature == signature), None)
        if plan is None:
            plan = plan_step(members, options, self._plans[0] if self._plans else None)
        self._plans = [plan, *(other for other in self._plans if other is not plan)][:KEPT_PLANS]
        return plan

    def _find_nonfinite(self, plan: StepPlan, members: Sequence[Member], gradients: Mapping[int, Tensor]) -> set[int]:
        """Return the numbers of the parameters to leave out under ``nonfinite=``, the same on every rank."""
        policy = self.defaults["nonfinite"]
        if policy == "propagate":
            return set()
        bad, found = find_nonfinite(plan, len(members), gradients)
        if found and policy == "raise":
            names = [members[number].name for number in bad] or "a parameter of other ranks"
            raise FloatingPointError(
                f"gradient with NaN or infinity in {names}; nothing was changed.{others_in_words(plan)}"
            )
        self.skipped_steps += len(bad)
        return set(bad)
