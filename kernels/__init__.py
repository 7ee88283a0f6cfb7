"""One file per op: reference, tile choice, kernel, launcher, op, public function, cost."""
