"""Checkpoints that transformers wrote, against what it computed with them; files and errors.

`tools/fixtures.py` makes the folders of `fixtures/`.
"""

import dataclasses
import json
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esscher.core import meshes
from esscher.core.errors import UsageError
from esscher.models import decoder, hf
from esscher.models.language_model import language_model

safetensors = pytest.importorskip("safetensors.numpy", reason="needs the extra `hf`: pip install 'esscher[hf]'")

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
NAMES = sorted(path.name for path in FIXTURES.iterdir())
each_name = pytest.mark.parametrize("name", NAMES)
TEXT = FIXTURES / "gemma3"


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# --- parity -----------------------------------------------------------------------------------------------------------


@each_name
def test_logits_and_64_greedy_tokens_are_those_of_transformers(name):
    config, params = hf.load(FIXTURES / name, dtype="float32")
    expected = np.load(FIXTURES / name / "expected.npz")

    @jax.jit
    def run(params, tokens, mask):
        model = language_model(params, config, tokens.shape[1] + 64)

        def step(carry, _):
            token = carry[0].argmax(-1)
            return model.step(carry[1], token), token

        _, greedy = jax.lax.scan(step, model.init(tokens, mask), None, 64)
        return decoder.logits(params, config, decoder.hidden(params, config, tokens)), greedy.T

    logits, greedy = run(params, expected["tokens"], expected["mask"])
    assert np.abs(expected["logits"]).max() > 4
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=5e-5)
    np.testing.assert_array_equal(greedy, expected["greedy"])


def test_the_fixtures_are_of_every_family_and_scaling():
    configs = [hf.load(FIXTURES / name)[0] for name in NAMES]
    assert {json.loads((FIXTURES / name / "config.json").read_text())["model_type"] for name in NAMES} == {
        "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text",
    }  # fmt: skip
    assert {config.rope.scaling for config in configs} == {"none", "linear", "llama3", "yarn"}
    assert {config.sliding for config in configs} >= {(True, True), (False, True, True), (True, False, True)}


# --- loading and saving -----------------------------------------------------------------------------------------------


@each_name
def test_saved_and_loaded_again_it_is_the_same_bitwise(name, tmp_path):
    config, params = hf.load(FIXTURES / name)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert hf.config_from_json(hf.config_to_json(config)) == config
    hf.save(tmp_path, config, params)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["torch_dtype"] == content["dtype"] == "bfloat16"
    assert content["model_type"] == json.loads((FIXTURES / name / "config.json").read_text())["model_type"]
    again, read = hf.load(tmp_path)
    assert again == config
    assert_same(read, params)


def test_weights_in_several_files_replace_those_in_one_and_the_reverse(tmp_path):
    config, params = hf.load(FIXTURES / "llama", dtype="float32")
    (tmp_path / "tokenizer.json").write_text("{}")
    for limit, files in ((30_000, 4), (10**9, 1), (40_000, 3)):
        other = jax.tree.map(lambda leaf, limit=limit: leaf + limit, params)
        hf.save(tmp_path, config, other, max_shard_bytes=limit, extra={"eos_token_id": 5})
        weights = list(tmp_path.glob("*.safetensors"))
        assert len(weights) == files
        assert all(path.stat().st_size < limit + 5000 for path in weights)
        assert len(list(tmp_path.iterdir())) == files + 2 + (files > 1)
        assert_same(hf.load(tmp_path)[1], other)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 5


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_every_device_gets_its_part_and_the_files_are_read_once(name, monkeypatch):
    mesh = meshes.make(data=2, fsdp=2, tensor=2)
    read = []
    piece = hf._piece
    monkeypatch.setattr(hf, "_piece", lambda *args: read.append(piece(*args)) or read[-1])
    config, split = hf.load(FIXTURES / name, mesh=mesh, dtype="float32")
    assert sum(part.size for part in read) == sum(leaf.size for leaf in jax.tree.leaves(split))
    _, whole = hf.load(FIXTURES / name, dtype="float32")
    assert_same(split, whole)
    specs = meshes.parameter_specs(decoder.axes(config), decoder.shapes(config), mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, split) == meshes.shardings(mesh, specs)
    assert split["layers"]["output"].addressable_shards[0].data.shape == (config.depth, 2, config.head_dim, 16)
    # an axis that is not the first of its group on disk
    _, odd = hf.load(FIXTURES / name, mesh=mesh, dtype="float32", rules={"kv": "tensor", "embed": "fsdp"})
    assert_same(odd, whole)


def test_saving_from_many_devices_is_saving_from_one(tmp_path):
    config, split = hf.load(FIXTURES / "llama_tied", mesh=meshes.make(data=2, fsdp=2, tensor=2))
    hf.save(tmp_path / "new" / "folder", config, split)
    assert_same(hf.load(tmp_path / "new" / "folder")[1], hf.load(FIXTURES / "llama_tied")[1])


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "language_model."])
def test_the_text_part_of_a_multimodal_gemma_is_taken(prefix, tmp_path):
    renamed = {prefix + name.removeprefix("model."): tensor for name, tensor in read_all(TEXT).items()}
    others = dict.fromkeys(
        ("vision_tower.vision_model.post_layernorm.bias", "model.multi_modal_projector.x"), np.ones(3)
    )
    safetensors.save_file(renamed | others, tmp_path / "model.safetensors")
    text = json.loads((TEXT / "config.json").read_text())
    text.pop("tie_word_embeddings")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    (config, params), (expected_config, expected) = hf.load(tmp_path), hf.load(TEXT)
    assert config == expected_config
    assert_same(params, expected)


def test_a_classifier_has_no_unembedding_and_its_head_is_a_tensor(tmp_path):
    tensors = read_all(FIXTURES / "llama_linear")
    del tensors["lm_head.weight"]
    tensors["score.weight"] = np.arange(64, dtype=np.float32).reshape(2, 32)
    tensors["model.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    write(tmp_path, tensors)
    config, params = hf.load(tmp_path)
    assert config.tied
    assert "unembedding" not in params
    np.testing.assert_array_equal(hf.load_tensor(tmp_path, "score.weight"), tensors["score.weight"])
    with pytest.raises(UsageError, match=r"has no tensor v_head; it has model\.embed_tokens\.weight, "):
        hf.load_tensor(tmp_path, "v_head")


# --- errors -----------------------------------------------------------------------------------------------------------


def read_all(folder):
    with safetensors.safe_open(folder / "model.safetensors", framework="np") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def write(folder, tensors, base="llama_linear"):
    shutil.copy(FIXTURES / base / "config.json", folder)
    safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def changed(**changes):
    """Writes a checkpoint with some tensors replaced, or removed where the new one is `None`."""

    def damage(folder):
        tensors = read_all(folder) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
        write(folder, {name: tensor for name, tensor in tensors.items() if tensor is not None})

    return damage


def cut(name):
    def damage(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return damage


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


DAMAGES = [
    ("llama", lambda f: (f / "config.json").unlink(), r"config\.json: no such file; the folder of a checkpoint has"),
    ("llama", cut("config.json"), r"config\.json: cannot be read \(.*\); get the file again"),
    ("llama", lambda f: (f / "config.json").write_text("[]"), r"config\.json: holds no object"),
    ("llama", lambda f: (f / "config.json").write_text("{}"), r"config\.json: model_type None is not supported"),
    ("llama", cut("model.safetensors.index.json"), r"index\.json is damaged \(.*\); get the file again"),
    ("llama", lambda f: (f / "model.safetensors.index.json").write_text("{}"), r"index\.json is damaged"),
    ("llama", lambda f: (f / "model-00002-of-00003.safetensors").unlink(), "names model-00002.*, which is not there"),
    ("llama", cut("model-00002-of-00003.safetensors"), r"model-00002-of-00003.safetensors is damaged \(.*incomplete"),
    (
        "llama",
        lambda f: shutil.copy(f / "model-00001-of-00003.safetensors", f / "model-00002-of-00003.safetensors"),
        r"model-0000\d-of-00003\.safetensors has no tensor .*, which model\.safetensors\.index\.json says",
    ),
    ("llama_linear", pickled, r"pytorch_model\.bin is a pickle, .*convert it with transformers' save_pretrained"),
    ("llama_linear", lambda f: (f / "model.safetensors").unlink(), "has neither model.safetensors nor .*: convert its"),
    (
        "llama_linear",
        lambda f: (f / "model.safetensors").write_bytes(b"junk"),
        r"is damaged \(.*\); get the file again",
    ),
    ("llama_linear", changed(model__norm__weight=None), r"has no tensor model\.norm\.weight; is its config\.json"),
    (
        "llama_linear",
        changed(lm_head__weight=None),
        r"has no tensor lm_head\.weight; save the model with its head, or set",
    ),
    (
        "llama_linear",
        changed(model__layers__1__mlp__up_proj__weight=np.ones((32, 56), np.float32)),
        r"model\.layers\.1\.mlp\.up_proj\.weight has shape \[32, 56\], config\.json makes it \[56, 32\]",
    ),
    ("llama_linear", changed(model__norm__weight=np.ones(32, np.int8)), r"model\.norm\.weight is I8, must be of F64"),
    (
        "llama_linear",
        changed(model__layers__0__self_attn__o_proj__bias=np.ones(32), model__layers__2__x=np.ones(1)),
        r"tensors that the decoder does not know: model\.layers\.0\.self_attn\.o_proj\.bias and 1 more",
    ),
    ("llama_linear", changed(v_head__summary__weight=np.ones(1)), r"does not know: v_head\.summary\.weight$"),
    (
        "llama_linear",
        changed(norm__weight=np.ones(32, np.float32)),
        r"has both model\.norm\.weight and norm\.weight, of which only one can count",
    ),
]


@pytest.mark.parametrize(("base", "damage", "message"), DAMAGES)
def test_what_is_wrong_with_a_checkpoint_is_said_in_one_line(base, damage, message, tmp_path):
    folder = shutil.copytree(FIXTURES / base, tmp_path / "copy")
    damage(folder)
    with pytest.raises(UsageError, match=message) as caught:
        hf.load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("dtype", ["int8", jnp.int32, "float8_e4m3fn", "bfloat61"])
def test_a_type_that_parameters_cannot_have_is_refused(dtype):
    with pytest.raises(UsageError, match=r"dtype must be one of float64, float32, float16, bfloat16, got .*(8|32|61)"):
        hf.load(TEXT, dtype=dtype)


def test_a_name_that_is_no_folder_is_asked_of_the_hub(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub", reason="needs the extra `hf`: pip install 'esscher[hf]'")
    asked = []

    def download(name, **options):
        asked.append((name, options["revision"]))
        if name == "org/absent":
            raise OSError("404 Client Error.\nmuch more")
        return str(FIXTURES / "llama")

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert hf.load("org/model", revision="abc")[0] == hf.load(FIXTURES / "llama")[0]
    assert asked == [("org/model", "abc")]
    absent = r"no folder org/absent, and the hub did not give it: 404 Client Error\.; check the name and the network"
    with pytest.raises(UsageError, match=absent):
        hf.load("org/absent")
    with pytest.raises(UsageError, match=r"no folder .*/absent; give the folder of a checkpoint, or a name on the hub"):
        hf.load(tmp_path / "absent")
    with pytest.raises(UsageError, match=r"config\.json is a file; give the folder"):
        hf.load(TEXT / "config.json")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"no folder org/model, and for the hub's .* pip install 'esscher\[hf\]'"):
        hf.load("org/model")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UsageError, match=r"checkpoints need safetensors: pip install 'esscher\[hf\]'"):
        hf.load(TEXT)


def test_saving_refuses_other_parameters_and_says_why_it_failed(tmp_path):
    config, params = hf.load(TEXT)
    with pytest.raises(ValueError, match=r"params\['unembedding'\] must be \(32, 67\), got nothing"):
        hf.save(tmp_path, dataclasses.replace(config, tied=False), params)
    with pytest.raises(ValueError, match=r"params\['embedding'\] must be \(68, 32\), got \(67, 32\)"):
        hf.save(tmp_path, dataclasses.replace(config, vocabulary=68), params)
    for kind in ("int32", "float8_e4m3fn"):
        with pytest.raises(ValueError, match=rf"params\['embedding'\] must be of float64, .*bfloat16, got {kind}"):
            hf.save(tmp_path, config, jax.tree.map(lambda leaf, kind=kind: leaf.astype(kind), params))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot save the checkpoint in .*file: .*; what was there is as before"):
        hf.save(tmp_path / "file", config, params)
