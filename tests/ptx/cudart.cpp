// Stands in for CUDA's runtime library: it keeps the PTX that a program brings, and hands every
// launch to a callback (cuda_extension.py), which runs it on the CPU. Also for what PyTorch knows
// of a CUDA device.
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <cstdint>
#include <map>
#include <string>

namespace {

struct Wrapper {  // what nvcc registers
  int magic, version;
  const void* data;
  void* unused;
};
struct Kernel {
  const void* module;
  std::string name;
};
struct Call {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
using OnLaunch = void (*)(const void* module, const char* name, const unsigned* grid,
                          const unsigned* block, size_t shared, void** arguments);
using OnAllocation = void (*)(void* start, int64_t bytes);

std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> all;
  return all;
}
Call pending;
OnLaunch on_launch;
OnAllocation on_allocation;

template <class Function>
Function of_torch(Function, const char* name) {
  static void* library = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
  return reinterpret_cast<Function>(dlsym(library, name));
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void dropbp_watch(OnLaunch launch, OnAllocation allocation) {
  on_launch = launch, on_allocation = allocation;
}

void** __cudaRegisterFatBinary(void* wrapper) {
  return reinterpret_cast<void**>(const_cast<void*>(static_cast<Wrapper*>(wrapper)->data));
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void** module, const char* host, char*, const char* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  kernels()[host] = {module, name};
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  pending = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pending.grid, *block = pending.block, *shared = pending.shared;
  *static_cast<void**>(stream) = pending.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(&kernels().at(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared, cudaStream_t) {
  const Kernel& known = *reinterpret_cast<Kernel*>(kernel);
  const unsigned sizes[] = {grid.x, grid.y, grid.z}, threads[] = {block.x, block.y, block.z};
  on_launch(known.module, known.name.c_str(), sizes, threads, shared, arguments);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "stand-in of CUDA's runtime"; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  // So few that blocks stride over rows; as much shared memory as an H200 has.
  *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : 227 * 1024;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*, int,
                                                                   size_t, unsigned) {
  *count = 1;
  return cudaSuccess;
}

// PyTorch's own, noted.
int aoti_torch_get_data_ptr(void*, void**);
int aoti_torch_get_storage_size(void*, int64_t*);
int aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int dtype,
                             int device_type, int device_index, void** tensor) {
  static const auto ordinary = of_torch(&aoti_torch_empty_strided, "aoti_torch_empty_strided");
  const int error = ordinary(dims, sizes, strides, dtype, device_type, device_index, tensor);
  if (error) return error;
  void* start;
  int64_t bytes;
  aoti_torch_get_data_ptr(*tensor, &start);
  aoti_torch_get_storage_size(*tensor, &bytes);
  on_allocation(start, bytes);
  return 0;
}

int aoti_torch_create_device_guard(int, void**) { return 0; }
int aoti_torch_delete_device_guard(void*) { return 0; }
int aoti_torch_get_current_cuda_stream(int, void** stream) {
  *stream = nullptr;
  return 0;
}
}
