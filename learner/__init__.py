"""Who uses data: the losses, the policy, the update, the replay buffer. Imports system only."""
