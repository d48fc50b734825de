"""How a method is tried by the contracts, where its defaults do not fit the synthetic task's tiny model."""

PARAMETERS = {
    "full": "full[learning_rate=1e-3]",
    "lora": "lora[rank=4]",
    "pruned_lora": "pruned_lora[rank=4,keep=0.4]",
    "adalora": "adalora[init_rank=6,target_rank=3]",
    "eva": "eva[rank=2,tau=0.5]",
    "plop": "plop[rank=4,batches=2]",
    "gora": "gora[rank=4,batches=3]",
    "ralora": "ralora[rank=2,batches=3]",
    "lora_ga": "lora_ga[rank=4,batches=3]",
    "lora_pro": "lora_pro[rank=4]",
    "peft": "peft[type=ia3]",
    "debora": "debora[rank=4,T_max=2,n0=0,step_size=0.5]",
}
