"""Asks a stock vLLM server of the bare language model about images: tower and connector run here, the words there.

    vllm serve Qwen/Qwen3-0.6B --enable-prompt-embeds --trust-request-chat-template
    python examples/ask_vllm.py --model_name_or_path me/eyes --server http://localhost:8000 --question "What is it?" photo.jpg

One running server answers for every connector of its language model. `frozen-prefix serve --upstream` does the same for many
clients at once.
"""

import argparse


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("images", nargs="+", help="files or URLs")
    parser.add_argument("--model_name_or_path", required=True, help="checkpoint: id on the Hub or folder")
    parser.add_argument("--server", default="http://localhost:8000")
    parser.add_argument("--question", default="What is it?")
    parser.add_argument("--max_tokens", type=int, default=64)
    args = parser.parse_args(arguments)  # before torch is imported, so that --help comes at once
    from openai import OpenAI

    from modeling_frozen import FrozenPrefixModel, FrozenPrefixProcessor
    from modeling_frozen.serving.prompt_embeds import chat_request

    model = FrozenPrefixModel.from_pretrained(args.model_name_or_path, load_language_model=False)
    processor = FrozenPrefixProcessor.from_pretrained(args.model_name_or_path)
    images = [{"type": "image", "image": image} for image in args.images]
    turn = {"role": "user", "content": [*images, {"type": "text", "text": args.question}]}

    client = OpenAI(base_url=f"{args.server}/v1", api_key="none")
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        **chat_request(model, processor, [turn]),
        max_tokens=args.max_tokens,
        temperature=0,
        stream=True,
    )
    said = ""
    for event in answer:
        piece = event.choices[0].delta.content or "" if event.choices else ""
        print(piece, end="", flush=True)
        said += piece
    print()
    return said


if __name__ == "__main__":
    main()
