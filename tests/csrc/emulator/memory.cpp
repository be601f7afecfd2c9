// What plain passes allocate, filled with NaN: on the CPU torch's shim leaves memory as it was, where torch.empty fills
// it while algorithms are deterministic. build.py gives this name to csrc's calls of aoti_torch_empty_strided.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstring>

extern "C" AOTITorchError emulator_empty_strided(int64_t ndim, const int64_t* sizes, const int64_t* strides,
                                                 int32_t dtype, int32_t device_type, int32_t device_index,
                                                 AtenTensorHandle* made) {
    const AOTITorchError error = aoti_torch_empty_strided(ndim, sizes, strides, dtype, device_type, device_index, made);
    if (error != AOTI_TORCH_SUCCESS) return error;
    void* data = nullptr;
    int64_t bytes = 0;
    if (aoti_torch_get_data_ptr(*made, &data) != AOTI_TORCH_SUCCESS) return AOTI_TORCH_FAILURE;
    if (aoti_torch_get_storage_size(*made, &bytes) != AOTI_TORCH_SUCCESS) return AOTI_TORCH_FAILURE;
    std::memset(data, 0xff, static_cast<size_t>(bytes));
    return AOTI_TORCH_SUCCESS;
}
