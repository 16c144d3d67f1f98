"""Let a language model answer plain prompts, for rows of text that keep it what it is while it learns to see.

    python -m examples.real_pictures.own_answers LM --output_dir outputs/real_pictures/texts

Written are `train.jsonl`, and `held_out.jsonl` for `evaluate.py`. Answers without an end within `--max_new_tokens` are
left out.
"""

import argparse
import json
import random
from itertools import permutations
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed


TOPICS = """water bread rain snow music sleep coffee football the moon the sun a garden a library a bicycle a train a
bridge a teacher a doctor a friend money time history geography mathematics chemistry biology poetry painting
photography cooking swimming running reading writing travel a holiday a birthday spring winter the sea a river a
mountain a forest the weather electricity a computer the internet a telephone a clock a map a kitchen a chair a dog a
horse an apple cheese rice soup tea salt sugar paper glass wood iron gold stone wind fire light sound
colour fishing dancing gardening camping hiking skiing chess singing drawing sewing a farm a market a
museum a school a hospital a castle a village a city a street a house a window a door a table a lamp a
mirror a bed a cup a spoon a bottle a coat a hat a shoe a ring a ship a car a bus a plane a rocket a
robot a camera a letter a book a newspaper a poem a film a song a piano a guitar a drum a flower a rose a
tree grass a leaf a seed a bee an ant a spider a fish a whale a bird an owl an eagle a cat a cow a sheep
a lion an elephant a monkey a bear a fox a wolf a mouse honey milk butter an egg an onion a tomato a
potato a lemon a banana chocolate pepper a cake a sandwich breakfast dinner a cloud a storm thunder a
rainbow a star the sky a planet the earth sand mud ice smoke dust air oil coal cotton wool silk plastic
copper silver a diamond courage patience kindness hope fear anger luck work a game a gift a promise a
secret a dream a question a number""".split()
PROMPTS = [
    "Explain {} in one sentence.",
    "Write one sentence about {}.",
    "What is {} good for? Answer briefly.",
    "Give me one fact about {}.",
    "Name three things that go with {}.",
    "Why do people like {}? Answer in a sentence.",
    "Write a short question about {}.",
    "Describe {} to a child in one sentence.",
    "What is the opposite of {}? Answer in a few words.",
    "Write a title for a story about {}.",
    "What would the world be without {}? One sentence.",
    "List two words that rhyme with {}.",
    "Is {} important? Answer briefly.",
    "Where would you find {}? Answer briefly.",
    "Write one line of a poem about {}.",
    "What did people know about {} long ago? One sentence.",
    "Give one tip about {}.",
    "Translate to French: I like {}.",
    "Finish the sentence: {} is",
    "How would you begin a letter about {}? One sentence.",
]
PAIRS = [
    "What do {} and {} have in common? One sentence.",
    "Write one sentence with {} and {}.",
    "What is the difference between {} and {}? One sentence.",
    "Which do people need more, {} or {}? Answer briefly.",
    "Which is older, {} or {}? Answer briefly.",
    "Write a title for a story about {} and {}.",
    "Begin a tale in which {} meets {}. One sentence.",
    "Give one reason to choose {} over {}.",
]


def prompts(count: int, seed: int) -> list[str]:
    """Draw so many different prompts: half about one topic, if there are enough, the others about two."""
    topics, words = [], iter(TOPICS)
    for word in words:
        topics.append(f"{word} {next(words)}" if word in ("a", "an", "the") else word)
    rng = random.Random(seed)
    one = [prompt.format(topic) for prompt in PROMPTS for topic in topics]
    two = [prompt.format(*pair) for prompt in PAIRS for pair in permutations(topics, 2)]
    drawn = rng.sample(one, min(len(one), count // 2))
    drawn += rng.sample(two, count - len(drawn))
    rng.shuffle(drawn)
    return drawn


@torch.inference_mode()
def main() -> None:
    """Ask, and keep the answers that end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="folder or Hub id of the language model")
    parser.add_argument("--template", type=Path, help="file of a chat template; by default the model's own")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--count", type=int, default=12_000, help="prompts")
    parser.add_argument("--held_out", type=int, default=256, help="of their answers, kept to measure with")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    set_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.text, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if args.template:
        tokenizer.chat_template = args.template.read_text(encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(args.text, dtype="auto").to(device).eval()
    asked, rows = prompts(args.count, args.seed), []
    for start in range(0, len(asked), args.batch_size):
        batch = [[{"role": "user", "content": prompt}] for prompt in asked[start : start + args.batch_size]]
        inputs = tokenizer.apply_chat_template(
            batch, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(device)
        replies = model.generate(
            **inputs, max_new_tokens=args.max_new_tokens, do_sample=True, temperature=0.7, top_p=0.95
        )
        for (turn,), reply in zip(batch, replies[:, inputs["input_ids"].shape[1] :], strict=True):
            if tokenizer.eos_token_id in reply.tolist():
                answer = tokenizer.decode(reply, skip_special_tokens=True).strip()
                rows.append({"messages": [turn, {"role": "assistant", "content": answer}], "images": []})
        print(f"{start + len(batch)} prompts, {len(rows)} answers that end", flush=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, part in (("held_out", rows[: args.held_out]), ("train", rows[args.held_out :])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part if row["messages"][1]["content"])
        (args.output_dir / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
