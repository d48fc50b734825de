"""How a method is tried by the contracts, where its defaults do not fit the synthetic task's tiny model."""

PARAMETERS = {
    "full": "full[learning_rate=1e-3]",
    "lora": "lora[rank=4]",
    "pruned_lora": "pruned_lora[rank=4,keep=0.4]",
    "adalora": "adalora[init_rank=6,target_rank=3]",
    "sora": "sora[rank=4,threshold=0.05]",
    "codyra": "codyra[rank=4,values=6,threshold=0.2]",
    "l1ra": "l1ra[rank=3,gate_learning_rate=0.3]",
    "adamss": "adamss[basis_rank=8,subspaces=4,components=20]",
    "autolora": "autolora[rank=4,upper_learning_rate=0.1]",
    "bilora": "bilora[rank=4,learning_rate=1e-2]",
    "diffora": "diffora[rank=4,upper_learning_rate=0.1]",
    "eva": "eva[rank=2,tau=0.5]",
    "plop": "plop[rank=4,batches=2]",
    "gora": "gora[rank=4,batches=3,learning_rate=1e-3]",
    "ralora": "ralora[rank=2,batches=3]",
    "lora_ga": "lora_ga[rank=4,batches=3]",
    "lora_pro": "lora_pro[rank=4]",
    "hydra": "hydra[parallel_rank=2,sequential_rank=3]",
    "peft": "peft[type=ia3]",
    "debora": "debora[rank=4,T_max=2,n0=0,step_size=0.5]",
}
