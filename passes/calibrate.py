"""Calibration: statistics of what flows into each site, gathered by running the program once over some batches."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from recast.passes.arguments import check_batches, check_program
from recast.passes.cache import OperatorCache
from recast.passes.calibration import Calibration
from recast.passes.drift import LayerDrift
from recast.passes.forms.stats import all_finite
from recast.passes.importance import Importances, Loss
from recast.passes.progress import track
from recast.passes.recipe import Recipe
from recast.passes.running import RunningStats
from recast.patterns.errors import CalibrationError
from recast.patterns.linear.find import find_linear
from recast.patterns.program import Program, tensor_digest
from recast.patterns.sites import LinearSite, Use

__all__ = ["Calibration", "calibrate"]


def calibrate(
    program: Program,
    batches: Iterable[Any],
    *,
    sample: int = 256,
    loss: Loss | None = None,
    drift: bool = False,
    recipe: Any = None,
    cache: OperatorCache | None = None,
    progress: bool | None = None,
) -> Calibration:
    """Gather the statistics of every site's inputs in one pass over some batches.

    Parameters
    ----------
    program
        As captured, before rewriting.
    batches
        Inputs of the model: each a tuple of positional arguments, a dict of keyword arguments, or one tensor. Streamed.
    sample
        How many input vectors of each site are kept, to measure errors on.
    loss
        ``loss(output, batch)``, a scalar: importances of rows and columns are gathered from its gradients, which forms
        such as ``fwsvd`` need. Each batch is run a second time for it.
    drift
        Measure how far each numbered layer moves the distribution that the model's head would give, averaged over tokens:
        forms shared ``across='drift'`` need it. The model must end in a head that gives logits.
    recipe
        Gather what each site will see behind the sites before it as this recipe rewrites them, and fit them so, one after
        another: a fit then makes ``‖W X - Ŵ X'‖`` small, X' being what arrives there and X what would have (the update of
        SVD-LLM, arXiv 2403.07378, section 3.2, for every form). The result is for plans by this recipe. All batches are
        held in memory.
    cache
        Where operators fitted for `recipe` go; by default on disk.
    progress
        Show a progress bar; by default on a terminal.

    Returns
    -------
    Calibration
        Gram matrices (float64, not divided by the number of tokens), means, largest values, and a sample; the drift of
        layers in ``.drift``.

    Raises
    ------
    CalibrationError
        There is no program, no batch was given, one does not fit the program's inputs, activations or gradients are not finite,
        the recipe shares between sites or has a budget, or `drift` is asked for and the model has no layers in a row or no logits.
    RecipeError
        The recipe cannot be read.

    Examples
    --------
    >>> import torch, recast
    >>> program = recast.capture(torch.nn.Sequential(torch.nn.Linear(8, 4)).eval(), (torch.randn(3, 8),))
    >>> recast.calibrate(program, [torch.randn(5, 8), torch.randn(6, 8)])["0"].tokens
    11
    """
    check_program(program, "calibration", CalibrationError)
    check_batches(batches)
    asked = None if recipe is None else Recipe.of(recipe)
    sites, _ = find_linear(program)
    points = _points(sites)
    running = {key: RunningStats(use.features, sample) for key, use in points.items()}
    importances = Importances(program, sites, loss) if loss is not None else None
    drifts = LayerDrift(program, sites) if drift else None
    probe: list[Any] = []
    count = 0
    held: list[list[Any]] = []
    for batch in track(batches, "calibrating", progress):
        leaves = _leaves(program, batch, count)
        if recipe is not None:
            held.append(leaves)
        if not count:
            probe = leaves
        with torch.no_grad():
            try:
                _Collector(program, points, running, drifts).run(*leaves)
            except CalibrationError as error:  # torch adds where in its graph it was, in many lines
                raise CalibrationError(str(error.args[0]).split("\n")[0]) from None
        if importances is not None:
            importances.add(leaves, batch)
        if drifts is not None:
            drifts.add()
        count += 1
    if not count:
        raise CalibrationError(
            "calibration: no batch was given; a handful of real inputs would do (a list of tensors, tuples or dicts)"
        )
    groups = {}
    members = {}
    for key, point in points.items():
        stats = running[key].stats()
        if stats.tokens == 0:
            continue
        groups[point.sites[0]] = stats
        members.update(dict.fromkeys(point.sites, point.sites[0]))
    if not groups and sites:
        raise CalibrationError("calibration: the batches hold no token at all; give inputs with at least one")
    weights = program.weights
    digests = {site.name: tensor_digest(weights[site.weights[0]], sample=4096) for site in sites}
    weighed = importances.means() if importances is not None else {}
    if unreached := [name for name, (rows, _) in weighed.items() if not bool(rows.any())]:
        warnings.warn(
            f"calibration: no gradient of the loss reaches {', '.join(unreached[:5])}{' ...' if unreached[5:] else ''}; "
            "forms that weigh by it (fwsvd) fit these as without a loss. A loss of all that the model gives would reach them",
            RuntimeWarning,
            stacklevel=2,
        )
    drifted = drifts.means() if drifts is not None else {}
    found = Calibration(program.fingerprint(), groups, members, probe, digests, weighed, drift=drifted)
    if asked is None:
        return found
    from recast.passes.sequential import behind_prefix  # which plans, and plans read calibrations

    with torch.no_grad():
        return behind_prefix(
            program,
            held,
            asked,
            found,
            cache or OperatorCache.default(),
            sample=sample,
            progress=progress,
        )


@dataclasses.dataclass
class _Point:
    """A value of the graph whose arrangement as vectors feeds some sites."""

    uses: list[Use]
    features: int
    sites: list[str]


def _points(sites: list[LinearSite]) -> dict[Any, _Point]:
    """Group sites that read exactly the same vectors, so that one Gram matrix serves them all."""
    uses_of = {
        site.name: tuple(
            (
                use.x,
                use.contraction.x,
                use.contraction.inputs,
                use.contraction.free,
                use.index,
                use.routing and (use.routing.index, use.routing.letters, use.routing.y),
            )
            for use in site.uses
        )
        for site in sites
    }
    points: dict[Any, _Point] = {}
    for site in sites:
        key = uses_of[site.name]
        point = points.setdefault(key, _Point(list(site.uses), site.in_features, []))
        point.sites.append(site.name)
    return points


class _Collector(fx.Interpreter):
    """Runs the program and hands each site's input over as it is computed."""

    def __init__(
        self,
        program: Program,
        points: Mapping[Any, _Point],
        running: Mapping[Any, RunningStats],
        drifts: LayerDrift | None = None,
    ) -> None:
        super().__init__(program.module)
        self.drifts = drifts
        self.wanted: dict[fx.Node, list[tuple[Use, Any]]] = {}
        self.running = running
        self.names = {key: point.sites[0] for key, point in points.items()}
        for key, point in points.items():
            for use in point.uses:
                # Which rows an expert sees may be known only when its product is computed.
                place = use.x if use.routing is None else use.product
                self.wanted.setdefault(place, []).append((use, key))
        self.routes: dict[fx.Node, Tensor | None] = {
            use.routing.index: None for point in points.values() for use in point.uses if use.routing is not None
        }

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if self.drifts is not None:
            self.drifts.see(n, value)
        if n in self.routes:
            self.routes[n] = value
        for use, key in self.wanted.get(n, ()):
            if use.routing is None:
                vectors = use.contraction.arrange(value, use.index)
            else:
                vectors = _routed(use, self.env[use.x], self.routes[use.routing.index])
            if not all_finite(vectors):
                raise CalibrationError(
                    f"calibration: what flows into {self.names[key]} is not finite in this batch; {_culprit(self.module)}"
                )
            self.running[key].add(vectors)
        return value


def _routed(use: Use, x: Tensor, route: Tensor | None) -> Tensor:
    """The vectors that an expert multiplies."""
    routing, contraction = use.routing, use.contraction
    assert routing is not None
    assert route is not None
    if routing.kind == "grouped":
        ends = [0, *route.tolist()]
        return x[ends[use.index or 0] : ends[(use.index or 0) + 1]]
    vectors = contraction.arrange(x)  # (free..., in_features); those rows count that one of their numbers sends here
    mine: Tensor = route.remainder(routing.count).eq(use.index or 0)
    letters = routing.letters
    for d in routing.letters:
        if d not in contraction.free:
            mine, letters = mine.any(letters.index(d)), letters.replace(d, "")
    mine = mine.permute(sorted(range(len(letters)), key=lambda k: contraction.free.index(letters[k])))
    for i, d in enumerate(contraction.free):
        if d not in letters:
            mine = mine.unsqueeze(i)
        elif vectors.shape[i] == 1:
            mine = mine.any(i, keepdim=True)
    return vectors[mine.expand(vectors.shape[:-1])]


def _culprit(module: nn.Module) -> str:
    """Where values that are not finite may come from: a weight that is not finite itself, or the data."""
    for name, weight in [*module.named_parameters(), *module.named_buffers()]:
        # Masks hold infinities on purpose, NaN never.
        if weight.is_floating_point() and bool(weight.isnan().any()):
            return f"the weight '{name}' holds NaN; repair it"
    return "check the batch for NaN or infinity, or calibrate in float32"


def _leaves(program: Program, batch: Any, number: int) -> list[Any]:
    try:
        if isinstance(batch, Tensor):
            leaves = program.flatten(batch)
        elif isinstance(batch, Mapping):
            leaves = program.flatten(**batch)
        else:
            leaves = program.flatten(*batch)
    except TypeError as error:
        raise CalibrationError(
            f"calibration: batch {number} does not fit the program: {error}. A batch is a tensor, a tuple of the positional "
            "inputs, or a dictionary of all inputs by name"
        ) from error
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not all_finite(leaf):
            raise CalibrationError(
                f"calibration: batch {number} holds NaN or infinite values; leave it out or repair it"
            )
        beginning = program.decoder is not None and isinstance(leaf, Tensor) and leaf.dim() == 4 and leaf.shape[2] == 0
        if isinstance(leaf, Tensor) and leaf.numel() == 0 and not beginning:  # a decoder's cache begins empty
            raise CalibrationError(f"calibration: batch {number} is empty (shape {tuple(leaf.shape)}); leave it out")
    return leaves
