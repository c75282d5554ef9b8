#!/usr/bin/env python3
"""The PyTorch programs that scripts/bench_vs_pytorch times: one process per measurement, which prints JSON.

    scripts/pytorch_baselines.py STEPS --baseline P1    a training step, or with --gate its losses
    scripts/pytorch_baselines.py STEPS --epoch          P1 from files to weights

STEPS is a folder written by `polytask bench EXPERIMENT --write STEPS`. P0 is the script one finds everywhere, P1 a well-written
one, P2 (CUDA only) P1 with a 16-bit trunk and CUDA graphs.
"""
import argparse
import json
import math
import random
import resource
import struct
import sys
import time
from pathlib import Path

PASSES = 4
WARM_UP = 30
# Score of a forbidden tag or transition.
FORBIDDEN = -1e4


def read_safetensors(path):
    import torch

    content = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    about = json.loads(header.pop("__metadata__")["polytask"])
    kinds = {"F32": torch.float32, "I64": torch.int64}
    tensors = {}
    for name, entry in header.items():
        start, end = (8 + length + at for at in entry["data_offsets"])
        flat = torch.frombuffer(bytearray(content[start:end]), dtype=kinds[entry["dtype"]])
        tensors[name.removeprefix("model/")] = flat.view(entry["shape"])
    return tensors, about


def model_of(experiment, tasks, vocabulary):
    """The model of the experiment for so many tokens."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    config = experiment["model"]
    trunk, embedding = config["trunk"], config["embedding"]

    def rows(n, dim):
        """Random rows; the first, of padding, is 0."""
        return nn.Parameter(torch.cat([torch.zeros(1, dim), torch.randn(n - 1, dim)]))

    class Crf(nn.Module):
        """-log p of tags in float32; a step of the forward algorithm is a matrix product, scaled by the row's maximum."""

        def __init__(self, labels, constrained):
            super().__init__()
            n = len(labels)
            self.transitions = nn.Parameter(torch.zeros(n, n))
            self.start = nn.Parameter(torch.zeros(n))
            self.end = nn.Parameter(torch.zeros(n))
            follows = lambda before, tag: not constrained or tag[:2] != "I-" or before[2:] == tag[2:]  # noqa: E731
            scores = lambda before: [0.0 if follows(before, tag) else FORBIDDEN for tag in labels]  # noqa: E731
            self.register_buffer("pairs", torch.tensor([scores(before) for before in labels]), persistent=False)
            self.register_buffer("first", torch.tensor(scores("O")), persistent=False)

        def forward(self, x, tags):
            on = tags >= 0
            tags = tags.clamp_min(0)
            transitions, start = self.transitions + self.pairs, self.start + self.first
            score = start[tags[:, 0]] + (x.gather(2, tags.unsqueeze(2)).squeeze(2) * on).sum(1)
            score = score + (transitions[tags[:, :-1], tags[:, 1:]] * on[:, 1:]).sum(1)
            score = score + self.end[tags.gather(1, on.sum(1, keepdim=True) - 1).squeeze(1)]
            alpha, step = start + x[:, 0], transitions.exp()
            for t in range(1, x.size(1)):
                most = alpha.amax(1, keepdim=True).detach()
                # A tag that cannot be reached has the gradient 0, not that of log 0.
                ahead = ((alpha - most).exp() @ step).clamp_min(1e-30).log() + most + x[:, t]
                alpha = torch.where(on[:, t : t + 1], ahead, alpha)
            return (torch.logsumexp(alpha + self.end, 1) - score).sum() / on.sum()

    class Characters(nn.Module):
        """max_t relu(conv(c)_t) over the bytes of each word."""

        def __init__(self, cnn):
            super().__init__()
            self.weight = rows(257, cnn["dim"])
            bound = (cnn["dim"] * cnn["width"]) ** -0.5
            uniform = lambda *size: nn.Parameter(torch.empty(*size).uniform_(-bound, bound))  # noqa: E731
            self.filters, self.bias = uniform(cnn["filters"], cnn["dim"], cnn["width"]), uniform(cnn["filters"])

        def forward(self, spelling):
            flat = spelling.flatten(0, 1)
            x = F.embedding(flat, self.weight, padding_idx=0).transpose(1, 2)
            x = F.conv1d(x, self.filters, self.bias, padding=self.filters.size(2) // 2).relu()
            return (x * (flat > 0).unsqueeze(1)).amax(2).view(*spelling.shape[:2], -1)

    class Embedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = rows(vocabulary, embedding["dim"])
            cnn = embedding["characters"].get("cnn")
            self.characters = Characters(cnn) if cnn else None
            self.width = embedding["dim"] + (cnn["filters"] if cnn else 0)

        def forward(self, batch):
            x = F.embedding(batch["token_ids"], self.weight, padding_idx=0)
            return x if self.characters is None else torch.cat([x, self.characters(batch["bytes"])], 2)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = Embedding()
            self.trunk = nn.LSTM(
                self.embedding.width, trunk["hidden"], trunk["layers"], batch_first=True, bidirectional=trunk["bidirectional"]
            )
            width = trunk["hidden"] * (2 if trunk["bidirectional"] else 1)
            self.heads = nn.ModuleDict({t["name"]: nn.ModuleDict({"output": nn.Linear(width, len(t["labels"]))}) for t in tasks})
            for task in tasks:
                tagging = experiment["tasks"][task["name"]].get("tagging", {})
                if tagging.get("decoder") == "crf":
                    self.heads[task["name"]]["crf"] = Crf(task["labels"], tagging["constraints"])

        def dropout(self, x, rate, locked):
            if not locked:
                return F.dropout(x, rate, self.training)
            return x * F.dropout(torch.ones_like(x[:, :1]), rate, self.training)

        def encode(self, batch, packed):
            x = self.dropout(self.embedding(batch), embedding["dropout"], embedding["locked_dropout"])
            if packed or not batch["even"]:
                x = nn.utils.rnn.pack_padded_sequence(x, batch["lengths"], batch_first=True, enforce_sorted=False)
                x, _ = self.trunk(x)
                x, _ = nn.utils.rnn.pad_packed_sequence(x, batch_first=True)
            else:
                x, _ = self.trunk(x)
            return self.dropout(x, trunk["dropout"], trunk["locked_dropout"])

        def loss(self, name, states, batch):
            head, labels = self.heads[name], batch[name]
            if labels.dim() == 1:
                if not batch["even"]:
                    states = states.masked_fill(~batch["mask"].unsqueeze(2), -torch.inf)
                return F.cross_entropy(head["output"](states.amax(1)), labels)
            logits = head["output"](states)
            if "crf" in head:
                return head["crf"](logits, labels)
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1)

    return Model()


def build(folder, device):
    """The model of the experiment with polytask's first weights, and its batches on the device."""
    import torch

    weights, _ = read_safetensors(folder / "weights.safetensors")
    arrays, about = read_safetensors(folder / "steps.safetensors")
    tasks, experiment = about["tasks"], about["experiment"]
    for missing, what in (
        (experiment["model"]["embedding"]["dim"] == 0 or experiment["model"]["embedding"]["vectors"], "pretrained vectors"),
        ("adamw" not in experiment["training"]["optimizer"], "optimizer but AdamW"),
        ("range" in experiment["training"]["schedule"], "schedule `range`"),
    ):
        if missing:
            sys.exit(f"the baselines have no {what}")
    model = model_of(experiment, tasks, len(weights["embedding.weight"]))
    unlike = sorted(set(weights) ^ set(model.state_dict()))
    if unlike:
        sys.exit(f"the baselines have no such model: they differ in {', '.join(unlike)}")
    model.load_state_dict(weights)
    model.to(device).train()
    steps = []
    for number in range(len(about["losses"])):
        batch = {name: arrays[f"{number}.{name}"].to(device) for name in ("token_ids", "bytes") if f"{number}.{name}" in arrays}
        width = batch["token_ids"].size(1)
        # Packing wants lengths on the host.
        batch["lengths"] = arrays[f"{number}.lengths"]
        batch["even"] = bool((batch["lengths"] == width).all())
        batch["mask"] = (torch.arange(width) < batch["lengths"].unsqueeze(1)).to(device)
        for task in tasks:
            rows = arrays.get(f"{number}.{task['name']}.rows", ())
            if len(rows) != len(batch["lengths"]):
                sys.exit("the baselines train joint sets alone: every row with the labels of every task")
            batch[task["name"]] = arrays[f"{number}.{task['name']}.labels"].to(device)
        steps.append(batch)
    return model, steps, about


def p0_step(model, optimizer, batch, tasks, weighting, clip):
    """A pass a task over packed sequences; every loss read at once."""
    import torch

    losses = [model.loss(t["name"], model.encode(batch, True), batch) for t in tasks]
    if weighting is not None:
        shared = [p for n, p in model.trunk.named_parameters() if "hh" in n or "ih" in n]
        norms = []
        for weight, loss in zip(weighting["weights"], losses):
            grads = torch.autograd.grad(weight * loss, shared, retain_graph=True, create_graph=True)
            norms.append(torch.cat([g.flatten() for g in grads]).norm())
        norms = torch.stack(norms)
        rates = torch.stack([l.detach() for l in losses]) / weighting["initial"]
        target = (norms.mean() * (rates / rates.mean()) ** 1.5).detach()
        gradient = torch.autograd.grad((norms - target).abs().sum(), weighting["weights"], retain_graph=True)[0]
    total = sum(losses) if weighting is None else (weighting["weights"].detach() * torch.stack(losses)).sum()
    optimizer.adamw.zero_grad()
    total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    if weighting is not None:
        with torch.no_grad():
            weighting["weights"] -= 0.025 * gradient
            weighting["weights"] *= len(tasks) / weighting["weights"].sum()
    return [loss.item() for loss in losses]


def p1_step(model, optimizer, batch, tasks, weighting, clip):
    """One pass, nothing read; GradNorm by the gradients at the representation."""
    import torch

    states = model.encode(batch, False)
    losses = [model.loss(t["name"], states, batch) for t in tasks]
    optimizer.adamw.zero_grad(set_to_none=True)
    if weighting is None:
        sum(losses).backward()
    else:
        weights = weighting["weights"].detach()
        at_states = []
        for task, loss, weight in zip(tasks, losses, weights):
            head = list(model.heads[task["name"]].parameters())
            at_state, *of_head = torch.autograd.grad(loss, [states, *head], retain_graph=True)
            at_states.append(at_state)
            for parameter, gradient in zip(head, of_head):
                parameter.grad = gradient * weight
        trunk = [p for n, p in model.named_parameters() if not n.startswith("heads.")]
        joined = sum(weight * gradient for weight, gradient in zip(weights, at_states))
        for parameter, gradient in zip(trunk, torch.autograd.grad(states, trunk, joined)):
            parameter.grad = gradient
        norms = torch.stack([gradient.norm() for gradient in at_states])
        rates = torch.stack([loss.detach() for loss in losses]) / weighting["initial"]
        weighted = weights * norms
        target = weighted.mean() * (rates / rates.mean()) ** 1.5
        with torch.no_grad():
            weighting["weights"] -= 0.025 * torch.sign(weighted - target) * norms
            weighting["weights"] *= len(tasks) / weighting["weights"].sum()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return [loss.detach() for loss in losses]


class Optimizer:
    """AdamW with the experiment's schedule, and the moving average of the weights."""

    def __init__(self, baseline, model, config, n_steps):
        import torch

        adamw, named = config["optimizer"]["adamw"], list(model.named_parameters())
        decays = lambda name, p: adamw["decay_all"] or (p.dim() > 1 and not name.startswith("embedding."))  # noqa: E731
        groups = [
            {"params": [p for name, p in named if decays(name, p) == decayed], "weight_decay": adamw["weight_decay"] * decayed}
            for decayed in (True, False)
        ]
        options = {"lr": adamw["learning_rate"], "betas": adamw["betas"], "eps": adamw["epsilon"]}
        if baseline != "P0":
            options["fused"] = True
        self.adamw = torch.optim.AdamW([group for group in groups if group["params"]], **options)
        self.baseline, self.config, self.n_steps, self.n_done = baseline, config, n_steps, 0
        self.parameters = [p.detach() for _, p in named]
        self.average = [p.clone() for p in self.parameters] if config["ema_decay"] else []

    def factor(self):
        """Of the learning rate at this step."""
        ((kind, options),) = self.config["schedule"].items()
        warmup = round(options["warmup_fraction"] * self.n_steps)
        step = self.n_done % self.n_steps
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(self.n_steps - warmup, 1)
        return {"constant": 1, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[kind]

    def step(self):
        import torch

        for group in self.adamw.param_groups:
            group["lr"] = self.config["optimizer"]["adamw"]["learning_rate"] * self.factor()
        self.adamw.step()
        self.n_done += 1
        if not self.average:
            return
        share = 1 - min(self.config["ema_decay"], (1 + self.n_done) / (10 + self.n_done))
        if self.baseline == "P0":
            for average, parameter in zip(self.average, self.parameters):
                average.mul_(1 - share).add_(parameter, alpha=share)
        else:
            torch._foreach_lerp_(self.average, self.parameters, share)


def graphed(model, optimizer, steps, tasks, clip):
    """P2: one CUDA graph a shape over the whole step of P1, with static inputs. Its trunk is float16, which is what autocast gives
    to cuDNN's LSTM whatever it is asked for. In its favour it has no loss scale, and a graph keeps the learning rate and the
    share of the moving average that it was recorded with."""
    import torch

    graphs = {}
    key_of = lambda batch: tuple(x.shape if torch.is_tensor(x) else x for x in batch.values())  # noqa: E731

    def run(batch):
        with torch.autocast("cuda", torch.float16):
            states = model.encode(batch, False)
        losses = [model.loss(t["name"], states.float(), batch) for t in tasks]
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip, foreach=True)
        optimizer.step()
        return losses

    for batch in steps:
        key = key_of(batch)
        if key in graphs or not batch["even"]:
            continue
        static = {k: v.clone() if torch.is_tensor(v) else v for k, v in batch.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                optimizer.adamw.zero_grad(set_to_none=True)
                run(static)
        torch.cuda.synchronize()
        optimizer.adamw.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            losses = run(static)
        graphs[key] = (graph, static, losses)

    def step(batch):
        found = graphs.get(key_of(batch))
        if found is None:
            optimizer.adamw.zero_grad(set_to_none=True)
            return run(batch)
        graph, static, losses = found
        for name, value in batch.items():
            if torch.is_tensor(value):
                static[name].copy_(value)
        graph.replay()
        return losses

    return step


def read_split(experiment, split):
    """Rows of the only set: by column, the words or tags of a sentence as a list, its class as a text."""
    (data,) = experiment["data"]["sets"].values()
    paths = [Path(experiment["data"]["root"]) / path for path in data[split]]
    if data["format"] not in ("jsonl", "parallel"):
        sys.exit("the baseline's epoch reads JSON lines and parallel files alone; try --no-epoch")
    read = lambda path: [line.rstrip("\n") for line in open(path, encoding="utf-8", newline="\n")]  # noqa: E731
    if data["format"] == "jsonl":
        return [json.loads(line) for path in paths for line in read(path)]
    heads = [(kind, head) for kinds in experiment["tasks"].values() for kind, head in kinds.items()]
    words = {data["tokens"]} | {head["column"] for kind, head in heads if kind == "tagging"}
    classes = {head["column"] for kind, head in heads if kind == "classification"}
    rows = []
    for path in paths:
        columns = {name: [line.split() for line in read(path / name)] for name in words}
        columns |= {name: read(path / name) for name in classes}
        rows += [dict(zip(columns, row)) for row in zip(*columns.values(), strict=True)]
    return rows


def encode_split(rows, words, columns, ids, forms):
    """Tensors of the rows of each length: sentences of one length lie together. `forms` numbers all words by spelling."""
    import torch

    by_length = {}
    for row in rows:
        by_length.setdefault(len(row[words]), []).append(row)
    groups = []
    for rows in by_length.values():
        group = {"token_ids": torch.tensor([[ids.get(word, 1) for word in row[words]] for row in rows])}
        group["forms"] = torch.tensor([[forms[word] for word in row[words]] for row in rows])
        for name, (column, number) in columns.items():
            of = lambda x: number.get(x, -1) if isinstance(x, str) else [number.get(tag, -1) for tag in x]  # noqa: E731, B023
            group[name] = torch.tensor([of(row[column]) for row in rows])
        groups.append(group)
    return groups


def spelling_of(words, max_bytes):
    """The bytes of each word, each plus 1, [N + 1, L] with 0 beyond its end, and how many, at least 1; the last row is of padding."""
    import torch

    spelled = [torch.tensor([byte + 1 for byte in word.encode()[:max_bytes]]) for word in words]
    table = torch.nn.utils.rnn.pad_sequence([*spelled, torch.zeros(1, dtype=torch.long)], batch_first=True)
    return table, torch.tensor([*map(len, spelled), 1])


def epoch(folder, device):
    """P1 from files to weights, with the experiment's numbers."""
    import torch

    _, about = read_safetensors(folder / "steps.safetensors")
    experiment, tasks, config = about["experiment"], about["tasks"], about["experiment"]["training"]
    (words,) = (data["tokens"] for data in experiment["data"]["sets"].values())
    read = {split: read_split(experiment, split) for split in ("train", "dev")}
    ids = {}
    for row in read["train"]:
        for word in row[words]:
            ids.setdefault(word, len(ids) + 2)
    columns = {}
    for name, head in experiment["tasks"].items():
        ((kind, head),) = head.items()
        values = [row[head["column"]] for row in read["train"]]
        labels = sorted(set(values) if kind == "classification" else {tag for tags in values for tag in tags})
        columns[name] = (head["column"], {label: i for i, label in enumerate(labels)})
    forms = {}
    for row in read["train"] + read["dev"]:
        for word in row[words]:
            forms.setdefault(word, len(forms))
    cnn = experiment["model"]["embedding"]["characters"].get("cnn")
    if cnn:
        spelling, n_bytes = (x.to(device) for x in spelling_of(forms, cnn["max_bytes"]))

    def with_bytes(batch):
        """The batch with the bytes of its words, up to the longest; on a GPU up to the longest of all, without waiting."""
        if cnn:
            batch["bytes"] = spelling[batch["forms"]]
            if device.type == "cpu":
                batch["bytes"] = batch["bytes"][..., : n_bytes[batch["forms"]].max()]
        return {**batch, "even": True}

    encoded = {split: encode_split(rows, words, columns, ids, forms) for split, rows in read.items()}
    encoded = {split: [{name: x.to(device) for name, x in group.items()} for group in encoded[split]] for split in encoded}
    tasks = [{**task, "labels": list(columns[task["name"]][1])} for task in tasks]
    model = model_of(experiment, tasks, len(ids) + 2).to(device).train()
    batches = []
    for group in encoded["train"]:
        order = torch.randperm(len(group["token_ids"]), device=device)
        batches += [(group, rows) for rows in order.split(config["batch_size"])]
    random.shuffle(batches)
    optimizer = Optimizer("P1", model, config, len(batches))
    for group, rows in batches:
        batch = with_bytes({name: tensor[rows] for name, tensor in group.items()})
        p1_step(model, optimizer, batch, tasks, None, config["clip_norm"] or math.inf)
    model.eval()
    right = {name: 0 for name in columns}
    with torch.no_grad():
        for group in encoded["dev"]:
            states = model.encode(with_bytes(group), False)
            for name in columns:
                head = model.heads[name]["output"]
                logits = head(states) if group[name].dim() > 1 else head(states.amax(1))
                right[name] += int((logits.argmax(-1) == group[name]).sum())
    torch.save(model.state_dict(), folder / "epoch.pt")


def time_steps(take, steps, device):
    """Milliseconds a step and the peak memory in bytes."""
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    # CUDA graphs are made for every shape before the clock starts.
    for batch in steps[:WARM_UP] if device.type == "cpu" else steps:
        take(batch)
    wait()
    started, done = time.perf_counter(), 0
    while done < PASSES * len(steps) and (done < len(steps) or time.perf_counter() - started < 3):
        take(steps[done % len(steps)])
        done += 1
    wait()
    ms = (time.perf_counter() - started) * 1000 / done
    if device.type == "cuda":
        peak = torch.cuda.max_memory_reserved()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"ms": ms, "peak": peak, "versions": f"torch {torch.__version__}"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", type=Path)
    parser.add_argument("--baseline", choices=["P0", "P1", "P2"], default="P1")
    parser.add_argument("--weighting", choices=["equal", "gradnorm"], default="equal")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--gate", action="store_true", help="print the losses of every step, without TF32")
    parser.add_argument("--epoch", action="store_true")
    arguments = parser.parse_args()

    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not arguments.gate
    if arguments.epoch:
        return epoch(arguments.steps, device)
    model, steps, about = build(arguments.steps, device)
    tasks, config = about["tasks"], about["experiment"]["training"]
    name, clip = arguments.baseline, config["clip_norm"] or math.inf
    optimizer = Optimizer(name, model, config, len(steps))
    weighting = None
    if arguments.weighting == "gradnorm":
        initial = torch.tensor([len(t["labels"]) for t in tasks], device=device).log()
        weights = torch.ones(len(tasks), device=device, requires_grad=name == "P0")
        weighting = {"weights": weights, "initial": initial}
    if name == "P0" and weighting is not None:
        torch.backends.cudnn.enabled = False
    if name == "P2":
        # torch's fused AdamW steps within a graph where its counters are on the device.
        for group in optimizer.adamw.param_groups:
            group["capturable"] = True
        take = graphed(model, optimizer, steps, tasks, clip)
    else:
        step = {"P0": p0_step, "P1": p1_step}[name]
        take = lambda batch: step(model, optimizer, batch, tasks, weighting, clip)  # noqa: E731
    if arguments.gate:
        print(json.dumps([[float(loss) for loss in take(batch)] for batch in steps]))
    else:
        print(json.dumps(time_steps(take, steps, device)))


if __name__ == "__main__":
    main()
