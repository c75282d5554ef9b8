"""Labels sentences with an exported model: python predict.py model.pt < sentences. Needs torch and tokenizers alone."""
import json
import sys

import torch
from tokenizers import Tokenizer

files = {"tokenizer.json": "", "labels.json": "", "polytask.json": ""}
model = torch.jit.load(sys.argv[1], map_location="cpu", _extra_files=files)
tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
tasks = json.loads(files["labels.json"])
max_bytes = json.loads(files["polytask.json"])["max_bytes"]  # null where the model reads no characters


def spelled(words, texts):
    """[1, T, L]: the bytes of each token's word, each plus 1, with 0 beyond its end."""
    rows = [[byte + 1 for byte in texts[word].encode()[:max_bytes]] for word in words]
    longest = max(map(len, rows))
    return torch.tensor([[row + [0] * (longest - len(row)) for row in rows]])


for line in map(str.strip, sys.stdin):
    encoding = tokenizer.encode(line, add_special_tokens=False)
    if not encoding.ids:
        print("{}")
        continue
    words = encoding.word_ids  # pieces of one word share its number
    first = [i for i, word in enumerate(words) if i == 0 or word != words[i - 1]]
    ids, n_tokens = torch.tensor([encoding.ids]), torch.tensor([len(encoding.ids)])
    inputs = [ids, n_tokens]
    if max_bytes:
        ranges = [encoding.word_to_chars(word) for word in range(len(first))]
        inputs.append(spelled(words, [line[start:end] for start, end in ranges]))
    with torch.no_grad():
        out = model(*inputs, torch.tensor([first]), torch.tensor([len(first)]))
    labels = {task["name"]: out[task["name"] + ".labels"].view(-1).tolist() for task in tasks}
    print(json.dumps({task["name"]: [task["labels"][i] for i in labels[task["name"]]] for task in tasks}))
