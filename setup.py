"""Packaging of deltasam-plugin: `pip install -c constraints.txt -e '.[fairseq,examples,test]'`."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"

# PyPI's `fairseq` 0.12.2 does not import on Python 3.11 and newer; `ve-fairseq` is a wheel of fairseq's later code.
FAIRSEQ = [
    "ve-fairseq==0.12.3; python_version >= '3.11'",
    "fairseq==0.12.2; python_version < '3.11'",
    "numpy<2; python_version >= '3.11'",  # it still says np.compat
    "numpy<1.24; python_version < '3.11'",  # fairseq 0.12.2 still says np.float
]

TENSORBOARD = ["tensorboard>=2.14"]  # fairseq's --tensorboard-logdir writes through torch.utils.tensorboard

EXAMPLES = [*TENSORBOARD, "sentencepiece>=0.1.99", "sacrebleu>=2.3", "tokenizers>=0.20", "safetensors>=0.4.3"]

REPORT = [*TENSORBOARD, "matplotlib>=3.8", "jinja2>=3", "tqdm>=4"]

TEST = [
    *EXAMPLES,
    *REPORT,
    "scipy>=1.10",
    "soundfile>=0.12",
    "transformers>=4.40,<5",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.6",
    "mypy>=1.11",
]

BENCHMARKS = ["pytorch_optimizer>=3", "scipy>=1.10", *REPORT]

setup(
    name="deltasam-plugin",
    version="0.1.0",
    description="Sharpness-aware minimization with dynamic reweighting (δ-SAM) for fairseq-train and for plain PyTorch",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["deltasam_plugin", "deltasam_plugin.*"]),
    package_data={"deltasam_plugin": ["py.typed", "tools/report.html"]},
    entry_points={
        "console_scripts": [
            "deltasam-find-rho = deltasam_plugin.find_rho:main",
            "deltasam-report = deltasam_plugin.report:main",
            "deltasam-sharpness = deltasam_plugin.sharpness:main",
        ]
    },
    zip_safe=False,
    python_requires=">=3.10",
    install_requires=["torch>=2.4", "numpy"],
    extras_require={"fairseq": FAIRSEQ, "examples": EXAMPLES, "report": REPORT, "test": TEST, "benchmarks": BENCHMARKS},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
