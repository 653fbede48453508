"""What the architecture changes: the affine field of Lemma 1 as a task, and who memorizes shuffled pairs of images."""
