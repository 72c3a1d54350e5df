// The CUDA kernels as the bindings see them. Launches are asynchronous on the caller's stream.
#pragma once

#include "dico/types.h"

namespace dico::cuda {

// Each returns nullptr on success, else CUDA's description of the error.
const char* adaln_modulate(Dtype, const AdalnArgs&, int device, void* stream);

}  // namespace dico::cuda
