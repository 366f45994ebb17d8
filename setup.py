"""Package metadata out of settings.ini, and a wheel that carries the notebooks and the committed reference results."""
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
CARRIED = {"nbs": ("_notebooks", "*.ipynb"), "outputs/reference": ("_reference", "*")}  # checkout folder → folder in the wheel


def settings() -> dict[str, str]:
    """settings.ini is the one place that says name, version and requirements: nbdev reads the same file."""
    cfg = ConfigParser(delimiters=["="], interpolation=None)
    cfg.read(HERE / "settings.ini", encoding="utf-8")
    return dict(cfg["DEFAULT"])


class BuildWithNotebooks(build_py):
    """Copies nbs/**/*.ipynb and outputs/reference beside the modules; an editable install reads them from the checkout instead."""

    def run(self):
        super().run()
        if self.editable_mode: return
        for source, (target, pattern) in CARRIED.items():
            goal = Path(self.build_lib) / "kilobench" / target
            if goal.exists(): shutil.rmtree(goal)  # a file deleted in the checkout must not live on in an old build folder
            for f in sorted((HERE / source).rglob(pattern)):
                rel = f.relative_to(HERE / source)
                if f.is_dir() or any(part.startswith(".") for part in rel.parts): continue
                (goal / rel).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(f, goal / rel)


cfg = settings()
setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else cfg["description"],
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["kilobench", "kilobench.*"]),
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split(), "wandb": cfg["wandb_requirements"].split()},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
    zip_safe=False,
    cmdclass={"build_py": BuildWithNotebooks},
)
