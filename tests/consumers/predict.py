"""Labels sentences with an exported model: python predict.py model.pt < sentences. Needs torch and tokenizers alone."""
import json
import sys

import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers

files = {"tokenizer.json": "", "labels.json": "", "polytask.json": ""}
model = torch.jit.load(sys.argv[1], map_location="cpu", _extra_files=files)
tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
tasks = json.loads(files["labels.json"])
about = json.loads(files["polytask.json"])
max_bytes = about["max_bytes"]  # null where the model reads no characters
(settings,) = about["tokenizer"].values()
cutters = {
    "whitespace": pre_tokenizers.WhitespaceSplit(),
    "punctuation": pre_tokenizers.Whitespace(),
    "character": pre_tokenizers.Split(Regex(r"\s+|\S"), "isolated"),
}
cutter = cutters[settings["split"]]


def spelled(owners, words):
    """[1, T, L]: the bytes of each token's word, each plus 1, with 0 beyond its end."""
    rows = [[byte + 1 for byte in words[owner].encode()[:max_bytes]] for owner in owners]
    longest = max(map(len, rows))
    return torch.tensor([[row + [0] * (longest - len(row)) for row in rows]])


for line in map(str.strip, sys.stdin):
    words = [word for word, _ in cutter.pre_tokenize_str(line) if not word.isspace()]
    encoding = tokenizer.encode(words, is_pretokenized=True, add_special_tokens=False)
    if not encoding.ids:
        print("{}")
        continue
    owners = encoding.word_ids  # pieces of one word share its number
    first = [i for i, owner in enumerate(owners) if i == 0 or owner != owners[i - 1]]
    ids, n_tokens = torch.tensor([encoding.ids]), torch.tensor([len(encoding.ids)])
    inputs = [ids, n_tokens]
    if max_bytes:
        inputs.append(spelled(owners, words))
    with torch.no_grad():
        out = model(*inputs, torch.tensor([first]), torch.tensor([len(first)]))
    labels = {task["name"]: out[task["name"] + ".labels"].view(-1).tolist() for task in tasks}
    print(json.dumps({task["name"]: [task["labels"][i] for i in labels[task["name"]]] for task in tasks}))
