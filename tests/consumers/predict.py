"""Labels sentences with an exported model: python predict.py model.pt < sentences. Needs torch and tokenizers alone."""
import json
import sys

import torch
from tokenizers import Tokenizer

files = {"tokenizer.json": "", "labels.json": ""}
model = torch.jit.load(sys.argv[1], map_location="cpu", _extra_files=files)
tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
tasks = json.loads(files["labels.json"])
for line in sys.stdin:
    encoding = tokenizer.encode(line.strip(), add_special_tokens=False)
    words = encoding.word_ids  # pieces of one word share its number
    first = [i for i, word in enumerate(words) if i == 0 or word != words[i - 1]]
    ids, n_tokens = torch.tensor([encoding.ids]), torch.tensor([len(encoding.ids)])
    with torch.no_grad():
        out = model(ids, n_tokens, torch.tensor([first]), torch.tensor([len(first)]))
    labels = {task["name"]: out[task["name"] + ".labels"].view(-1).tolist() for task in tasks}
    print(json.dumps({task["name"]: [task["labels"][i] for i in labels[task["name"]]] for task in tasks}))
