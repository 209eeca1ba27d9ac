"""Calibration behind a rewritten prefix: each site is fitted on what it will see once all sites before it are rewritten."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from recast.passes.cache import OperatorCache
from recast.passes.calibration import Calibration
from recast.passes.decide import decide
from recast.passes.forms.stats import all_finite
from recast.passes.plan import Skip, Target, forms_by_name, measured_entries, targets_of
from recast.passes.progress import track
from recast.passes.recipe import Recipe
from recast.passes.running import RunningStats
from recast.patterns.constants import Constants
from recast.patterns.errors import CalibrationError
from recast.patterns.linear.find import as_matrix, find_linear
from recast.patterns.program import Program
from recast.patterns.sites import LinearSite, Use

__all__ = ["behind_prefix"]


def behind_prefix(
    program: Program,
    batches: Sequence[Sequence[Any]],
    asked: Recipe,
    calibration: Calibration,
    cache: OperatorCache,
    *,
    sample: int,
    progress: bool | None = None,
) -> Calibration:
    """Go through the program once, as it is and as the recipe rewrites it side by side, fitting sites as they come.

    Matrices that are used several times, and those of experts, keep the statistics of the program as it is, and their dense
    weights in the prefix. Rounding of activations by forms that do it is left out of the prefix.

    Parameters
    ----------
    program
        As captured.
    batches
        Flat inputs of each; all of them are held, with the values that are still needed, at the same time.
    asked
        Forms of single matrices, without a budget.
    calibration
        Of the program as it is.
    cache
        Takes the fitted operators, so that a plan by the same recipe finds them.
    sample
        How many input vectors of each site are kept.
    progress
        Show a progress bar.

    Raises
    ------
    CalibrationError
        The recipe has forms of blocks or shared ones, or chooses under a budget.
    RecipeError
        It has candidates without a budget.
    """
    _refuse(asked)
    walk = _Walk(program, batches, asked, calibration, cache, sample)
    nodes = list(program.graph.nodes)
    last = {operand: node for node in nodes for operand in node.all_input_nodes}
    for node in track(nodes, "fitting in order", progress):
        walk.step(node)
        walk.forget([operand for operand in node.all_input_nodes if last[operand] is node])
    return walk.found


def _refuse(asked: Recipe) -> None:
    asked.check()
    if asked.budget is not None:
        raise CalibrationError(
            "calibration: sites are fitted in their order, and a budget is decided over all of them at once; "
            "give the recipe's forms without a budget"
        )
    for form, told in asked.of_several_matrices():
        raise CalibrationError(
            f"calibration: '{form}' {told}, and here single matrices are fitted in their order; "
            "calibrate without a recipe for it"
        )


class _Walk:
    """Both programs as far as they have run, for every batch."""

    def __init__(
        self,
        program: Program,
        batches: Sequence[Sequence[Any]],
        asked: Recipe,
        calibration: Calibration,
        cache: OperatorCache,
        sample: int,
    ) -> None:
        self.constants = Constants(program)
        sites, _ = find_linear(program, self.constants)
        self.asked, self.cache, self.sample = asked, cache, sample
        self.wanted, _, _ = forms_by_name(asked, sites)
        self.found = dataclasses.replace(
            calibration, groups=dict(calibration.groups), members=dict(calibration.members), behind=asked.digest
        )
        self.at: dict[fx.Node, list[LinearSite]] = {}
        for site in sites:
            if _in_order(site) and site.name in calibration:
                self.at.setdefault(site.uses[0].product, []).append(site)
        self.seen: dict[
            Any, str | None
        ] = {}  # which group has the statistics of a value, None for that of the calibration
        self.pairs = []
        for leaves in batches:
            pair = (fx.Interpreter(program.module, False), fx.Interpreter(program.module, False))
            for one in pair:
                one.args_iter = iter(program.graph.process_inputs(*leaves))
            self.pairs.append(pair)

    def step(self, node: fx.Node) -> None:
        """Run one node in both programs, after the sites that are products here were fitted."""
        weights = self._fitted(node)
        for dense, rough in self.pairs:
            dense.env[node] = dense.run_node(node)
            alike = node.op != "placeholder" and all(dense.env[n] is rough.env[n] for n in node.all_input_nodes)
            if alike and not weights:
                rough.env[node] = dense.env[node]
                continue
            if node.op == "placeholder":
                next(rough.args_iter)
                rough.env[node] = dense.env[node]
                continue
            kept = {operand: rough.env[operand] for operand in weights}
            rough.env.update(weights)
            rough.env[node] = rough.run_node(node)
            rough.env.update(kept)

    def forget(self, nodes: Sequence[fx.Node]) -> None:
        """Free values that nothing reads any more."""
        for dense, rough in self.pairs:
            for node in nodes:
                dense.env.pop(node, None)
                rough.env.pop(node, None)

    def _fitted(self, node: fx.Node) -> dict[fx.Node, Tensor]:
        """Weights of a product as its fitted operators make them; empty where it stays dense."""
        changed: dict[fx.Node, Tensor] = {}
        for site in self.at.get(node, ()):
            use = site.uses[0]
            group = self._group(site, use)
            if group is not None:
                self.found.members[site.name] = group
            targets = targets_of([site], self.constants, self.found)
            pieces = [self._decided(targets[name]) for name in targets]
            if all(piece is None for piece in pieces):
                continue
            matrix = targets[site.name].matrix.read().detach().clone()
            for piece, rows in zip(pieces, [((0, len(matrix)),), *(part.rows for part in site.parts)], strict=True):
                if piece is not None:
                    place = torch.cat([torch.arange(*pair) for pair in rows])
                    matrix[place] = piece.to(matrix.dtype)
            value = changed.get(use.weight)
            changed[use.weight] = _with_matrix(
                self.constants.value(use.weight) if value is None else value, use, matrix
            )
        return changed

    def _decided(self, target: Target) -> Tensor | None:
        """What a site or a part becomes, dense; None if it stays as it is."""
        forms = self.wanted.get(target.name)
        if not forms:
            return None
        targets = {target.name: target}
        options = {target.name: measured_entries([target.name], forms[0], targets, self.cache)}
        if isinstance(decide(options, targets, self.asked)[target.name], Skip):
            return None
        return self.cache.fit(target.matrix, forms[0], target.stats, where=target.name).operator.to_dense()

    def _group(self, site: LinearSite, use: Use) -> str | None:
        """Gather statistics of what a site reads in the rewritten program, once for all that read the same."""
        key = (use.x, use.contraction.x, use.contraction.inputs, use.contraction.free, use.index)
        if key in self.seen:
            return self.seen[key]
        if all(dense.env[use.x] is rough.env[use.x] for dense, rough in self.pairs):
            self.seen[key] = None
            return None
        running = RunningStats(site.in_features, self.sample)
        cross = torch.zeros(site.in_features, site.in_features, dtype=torch.float64)
        for dense, rough in self.pairs:
            before, after = (
                use.contraction.arrange(one.env[use.x], use.index).reshape(-1, site.in_features)
                for one in (dense, rough)
            )
            if not all_finite(after):
                raise CalibrationError(
                    f"calibration: behind the sites that were rewritten, what flows into {site.name} is not finite; "
                    "rewrite fewer or less"
                )
            running.add(after)
            for a, b in zip(torch.split(before, 8192), torch.split(after, 8192), strict=True):
                cross.addmm_(a.double().cpu().T, b.double().cpu())
        self.found.groups[site.name] = dataclasses.replace(running.stats(), cross=cross)
        self.seen[key] = site.name
        return site.name


def _in_order(site: LinearSite) -> bool:
    """Whether a site has one place in the order, with operands that can be exchanged there."""
    use = site.uses[0]
    operands = use.product.all_input_nodes
    return len(site.uses) == 1 and use.routing is None and use.weight in operands and use.x in operands


def _with_matrix(value: Tensor, use: Use, matrix: Tensor) -> Tensor:
    """A weight as the program holds it, with the matrix of a use in the place of its own."""
    place = as_matrix(torch.arange(value.numel()).reshape(value.shape), use)
    flat = value.detach().flatten().clone()
    flat[place.flatten()] = matrix.flatten().to(flat.dtype)
    return flat.reshape(value.shape)
