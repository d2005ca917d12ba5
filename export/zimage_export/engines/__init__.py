"""TensorRT: block programs, the types they compute in, and the engines built from them."""
