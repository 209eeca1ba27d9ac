"""Which blocks a program has."""

from __future__ import annotations

from recast.passes.calibration import Calibration
from recast.passes.exact import Edit
from recast.passes.modules.block import ROLES, Block
from recast.passes.modules.mixture import Mixture
from recast.patterns.recognise import recognise
from recast.patterns.sites import AttentionSite, MLPSite, MoESite

__all__ = ["blocks_of"]


def blocks_of(edit: Edit, calibration: Calibration | None) -> dict[str, Block]:
    """The feed-forward, attention and mixture blocks of a program, by name; those that use the same linears are one."""
    together: dict[tuple[object, ...], list[MLPSite | AttentionSite]] = {}
    mixtures: dict[tuple[str, ...], list[MoESite]] = {}
    for site in recognise(edit.program, edit.constants).sites:
        if isinstance(site, MoESite):
            mixtures.setdefault(tuple(p.name for roles in site.experts for p in roles.values()), []).append(site)
        if not isinstance(site, MLPSite | AttentionSite):
            continue
        for kind, roles in ROLES.items():
            if kind.partition(":")[0] == site.kind:
                pieces = (getattr(site, role) for role in roles)
                key = (kind, *((p.site.name, p.part) if p is not None else None for p in pieces))
                together.setdefault(key, []).append(site)
    blocks = [Block(edit, sites, str(key[0]), calibration) for key, sites in together.items()]
    blocks += [Mixture(edit, sites, "moe", calibration) for sites in mixtures.values()]
    return {block.name: block for block in blocks}
