"""The five stages of a run without notebooks, in this process: python stages.py PROJECT NAME OVERRIDES [STAGE…]. What the kills kill, and what they are compared with."""
import importlib
import sys

from kilobench.core.recipe import UserError, load_recipe_class
from kilobench.core.run import Run, outputs_dir
from kilobench.core.series import STAGES

if __name__ == "__main__":
    project, name, values, *only = sys.argv[1:]
    try:
        run = Run.open(load_recipe_class(project).make("smoke", values), outputs_dir() / project / name)
        for stage in only or STAGES: getattr(importlib.import_module(f"kilobench.{project}.{stage}"), stage)(run)
    except UserError as e: sys.exit(print(f"kilobench: {e}", file=sys.stderr) or 2)      # as the program says it
