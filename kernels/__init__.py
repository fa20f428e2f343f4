"""The ops that dominate a step, one a file: formula, plain-torch reference, Triton kernels, one public function."""
