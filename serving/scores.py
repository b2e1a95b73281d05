import json

import torch
from safetensors.torch import load_file
from transformers import AutoModel

FOLDER = "."
llama = AutoModel.from_pretrained(FOLDER).float().eval()
parts = load_file(f"{FOLDER}/recommender.safetensors")
with open(f"{FOLDER}/recommender.json", encoding="utf-8") as file:
    about = json.load(file)
prompt, response = (torch.tensor(about[name]) for name in ("prompt_ids", "response_ids"))


@torch.no_grad()
def scores(history):  # lines of items.csv, from 0, oldest first -> a score for every line
    if not len(history):
        return parts["popularity"]
    items = parts["item_table"][history[-about["max_seq_length"] :]]
    items = items @ parts["adapter.weight"].T + parts["adapter.bias"]
    embed = llama.get_input_embeddings()
    inputs = torch.cat([embed(prompt), items, embed(response)])[None]
    slot = torch.arange(inputs.shape[1])
    empty = about["max_seq_length"] - len(items)  # slots between the prompt and the items
    position = slot + empty * (slot >= len(prompt))
    mask = torch.ones_like(slot)  # else a jump in the positions is read as another sequence
    call = {"inputs_embeds": inputs, "position_ids": position[None], "attention_mask": mask[None]}
    state = llama(**call).last_hidden_state[0, -1]
    return parts["item_table"] @ (parts["head.weight"] @ state)


if __name__ == "__main__":
    print(scores([0, 1, 2]).topk(10).indices.tolist())
