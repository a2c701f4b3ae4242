"""Recipe: what is wanted of any model. Plan: what happens to this one."""

from __future__ import annotations

from fewbit.plan.plan import Plan, Site
from fewbit.plan.planner import make_plan
from fewbit.plan.recipe import Recipe, Rule, load_recipe, presets

__all__ = ["Plan", "Recipe", "Rule", "Site", "load_recipe", "make_plan", "presets"]
