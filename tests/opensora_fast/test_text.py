"""The text encoders, on the tiny pair that `save_tiny_text_encoders` writes."""

import re
import shutil
import sys

import pytest
import torch

from opensora_fast import streamed_loading
from opensora_fast.errors import UserError
from opensora_fast.peak_memory import LiveBytes
from opensora_fast.text import TextEncoders, cut_notes, load_clip, load_t5, save_tiny_text_encoders

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    save_tiny_text_encoders(folder, t5_dim=48, clip_dim=32, seed=0)
    return folder


def load(folder, **options):
    return TextEncoders.from_folders(
        folder / "t5", folder / "clip", **({"max_length_t5": 40, "max_length_clip": 60} | options)
    )


def test_shapes_scale_and_no_gradients(folder):
    txt, vec = load(folder).encode(
        ["rain on the sea", "a much longer prompt than there is room for in so few tokens, surely"]
    )
    assert txt.shape == (2, 40, 48)
    assert vec.shape == (2, 32)
    assert not txt.requires_grad
    assert not vec.requires_grad
    assert txt.std().item() == pytest.approx(1, abs=0.1)
    assert vec.std().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a red ball rolls", "a blue ball rolls"),
        ("the cat looks at the dog", "the dog looks at the cat"),
        ("a ball rolls to the left", "a ball rolls to the right"),
        ("", "rain"),
    ],
)
def test_both_outputs_depend_on_the_whole_prompt(folder, one, other):
    for output in load(folder).encode([one, other]):
        assert (output[0] - output[1]).norm() > 0.2 * output[0].norm()


def test_a_prompt_is_encoded_the_same_in_any_batch(folder):
    encoders = load(folder)
    together = encoders.encode(["rain on the sea", "snow"])
    alone = encoders.encode(["snow"])
    torch.testing.assert_close(together[0][1:], alone[0])
    torch.testing.assert_close(together[1][1:], alone[1])


def test_padding_is_attended(folder):
    short, long = (load(folder, max_length_t5=length).encode(["rain"])[0] for length in (8, 40))
    assert not torch.allclose(short[:, :4], long[:, :4], atol=1e-3)


def test_null_is_the_empty_prompt_encoded_once(folder):
    encoders = load(folder)
    for null, empty in zip(encoders.null(), encoders.encode([""]), strict=True):
        assert torch.equal(null, empty)
    assert encoders.null() is encoders.null()


def test_the_seed_makes_the_weights_and_leaves_the_generator_alone(folder, tmp_path):
    state = torch.get_rng_state()
    save_tiny_text_encoders(tmp_path / "same", t5_dim=48, clip_dim=32, seed=0)
    save_tiny_text_encoders(tmp_path / "other", t5_dim=48, clip_dim=32, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    first, same, other = (load(path).encode(["rain"]) for path in (folder, tmp_path / "same", tmp_path / "other"))
    assert torch.equal(first[0], same[0])
    assert torch.equal(first[1], same[1])
    assert not torch.allclose(first[1], other[1], atol=0.1)


def test_dtype(folder):
    txt, vec = load(folder, dtype=torch.bfloat16).encode(["rain"])
    assert txt.dtype == vec.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "model_class"), [("t5", "T5EncoderModel"), ("clip", "CLIPTextModel")])
def test_weights_dtypes_and_buffers_are_those_that_transformers_loads(folder, name, model_class, dtype):
    expected = getattr(transformers, model_class).from_pretrained(folder / name, dtype=dtype).eval()
    ours = {"t5": load_t5, "clip": load_clip}[name](folder / name, max_length=40, device="cpu", dtype=dtype).model
    for tensors in ("named_parameters", "named_buffers"):
        found, theirs = (dict(getattr(model, tensors)()) for model in (ours, expected))
        assert found.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert found[key].dtype == tensor.dtype, key
            assert torch.equal(found[key], tensor), key
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_loading_holds_no_copy_on_the_host(tmp_path, monkeypatch):
    """The device "meta" stands for one with memory of its own: nothing that is there counts."""
    monkeypatch.setattr(streamed_loading, "BLOCK_BYTES", 2**14)
    config = transformers.T5Config(vocab_size=384, d_model=64, d_kv=32, d_ff=1024, num_heads=2, num_layers=2)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path)
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    with LiveBytes() as live:
        model = load_t5(tmp_path, max_length=8, device="meta", dtype=torch.bfloat16).model
    assert sum(parameter.nbytes for parameter in model.parameters()) > 2**19
    assert live.peak <= 4 * 2**14


def test_a_prompt_that_is_cut_is_told_once(folder, tmp_path):
    """The tokenizer of these encoders has a token for each byte, and one behind them."""
    prompts = ["x" * 20, "y" * 19, "", "é" * 12, "x" * 20]
    notes = cut_notes(folder / "t5", 20, prompts)
    assert [re.findall(r"(.)'\.\.\.: has (\d+) tokens, of which T5 reads 20", note) for note in notes] == [
        [("x", "21")],
        [("é", "25")],
    ]
    assert cut_notes(tmp_path / "nowhere", 20, ["short"]) == []
    with pytest.raises(UserError, match="nowhere holds no tokenizer") as refusal:
        cut_notes(tmp_path / "nowhere", 20, ["x" * 30])
    assert "\n" not in str(refusal.value)


def test_shards_of_pickles_are_refused_with_a_way_out(folder, tmp_path):
    shutil.copytree(folder / "t5", tmp_path / "t5")
    (tmp_path / "t5" / "model.safetensors").unlink()
    (tmp_path / "t5" / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(UserError, match=r"several pytorch_model-\*\.bin, which are not read: .*save_pretrained"):
        load_t5(tmp_path / "t5", max_length=8, device="cpu", dtype=torch.float32)


def test_an_encoder_is_taken_out_of_a_whole_model_without_noise(folder, tmp_path, capfd):
    config = transformers.T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=1)
    transformers.T5Model(config).save_pretrained(tmp_path)
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    capfd.readouterr()
    txt, _ = TextEncoders.from_folders(tmp_path, folder / "clip", max_length_t5=8).encode(["rain"])
    assert txt.shape == (1, 8, 16)
    assert capfd.readouterr().err == ""


def test_weights_are_never_made_up(folder):
    with pytest.raises(
        UserError, match="clip holds no T5EncoderModel: its config.json is of the type 'clip_text_model'"
    ):
        TextEncoders.from_folders(folder / "clip", folder / "clip")


def test_clip_must_pool_at_the_end_of_the_prompt(folder, tmp_path):
    transformers.CLIPTextModel(
        transformers.CLIPTextConfig(vocab_size=384, hidden_size=16, num_attention_heads=2, eos_token_id=7)
    ).save_pretrained(tmp_path)
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="pools at token 7 and its tokenizer ends prompts with 1"):
        TextEncoders.from_folders(folder / "t5", tmp_path)


def test_what_cannot_be_loaded_is_named(folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"text encoder folder .*/nowhere does not exist"):
        TextEncoders.from_folders(tmp_path / "nowhere", folder / "clip")
    with pytest.raises(UserError, match=r"text encoder folder .* holds no T5EncoderModel") as caught:
        TextEncoders.from_folders(tmp_path, folder / "clip")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="max_length_clip=600: .* has 512 positions"):
        load(folder, max_length_clip=600)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'opensora-fast\[text\]'"):
        load(folder)
