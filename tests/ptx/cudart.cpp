// Stands in for CUDA's runtime library: it keeps the PTX that a program brings, and hands every
// launch to a callback (cuda_extension.py), which runs it on the CPU. Also for what PyTorch knows
// of a CUDA device: here tensors are on device 1, where device 0 is the current one.
//
// What is missing here cannot be linked, and so is not called. All that is here may be called while
// a stream is captured; what CUDA forbids then (to allocate, to wait, to ask how far a stream is)
// must not be added. Nor is there memory for __device__ variables, which all streams would share: a
// kernel that touches one is outside of all tensors.
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <cstdint>
#include <map>
#include <string>
#include <utility>

namespace {

struct Wrapper {  // what nvcc registers
  int magic, version;
  const void* data;
  void* unused;
};
struct Kernel {
  const void* module;
  std::string name;
  size_t most_shared = 48 << 10;  // until the program asks for more
};
struct Call {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
using OnLaunch = void (*)(const void* module, const char* name, const unsigned* grid,
                          const unsigned* block, size_t shared, void** arguments,
                          const void* stream);
using OnAllocation = void (*)(void* start, int64_t bytes);

std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> all;
  return all;
}
constexpr int kDevice = 1;
int current_device = 0;
void* current_stream;  // of kDevice
// So few that blocks stride over rows; as much shared memory as an H200 has.
int num_multiprocessors = 2, shared_bytes = 227 << 10;
Call pending;
OnLaunch on_launch;
OnAllocation on_allocation;
cudaError_t last_error = cudaSuccess;

cudaError_t failed_unless(bool is_right, cudaError_t error) {
  if (!is_right) last_error = error;
  return is_right ? cudaSuccess : error;
}

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
__attribute__((visibility("default"))) void dropbp_set(void* stream, int multiprocessors,
                                                       int bytes) {
  current_stream = stream, num_multiprocessors = multiprocessors, shared_bytes = bytes;
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
                               size_t shared, cudaStream_t stream) {
  const Kernel& known = *reinterpret_cast<Kernel*>(kernel);
  const auto error = current_device != kDevice    ? cudaErrorInvalidResourceHandle
                     : shared > known.most_shared ? cudaErrorInvalidValue
                                                  : cudaSuccess;
  if (error) return failed_unless(false, error);
  const unsigned sizes[] = {grid.x, grid.y, grid.z}, threads[] = {block.x, block.y, block.z};
  on_launch(known.module, known.name.c_str(), sizes, threads, shared, arguments, stream);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidResourceHandle ? "a stream of another device"
         : error == cudaErrorInvalidDevice       ? "another device"
                                                 : "more shared memory than was asked for";
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? num_multiprocessors : shared_bytes;
  return failed_unless(device == kDevice, cudaErrorInvalidDevice);
}
cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute, int value) {
  kernels().at(host).most_shared = static_cast<size_t>(value);
  return failed_unless(current_device == kDevice, cudaErrorInvalidDevice);
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*, int,
                                                                   size_t, unsigned) {
  *count = 1;
  return failed_unless(current_device == kDevice, cudaErrorInvalidDevice);
}

// PyTorch's own, noted.
int aoti_torch_get_data_ptr(void*, void**);
int aoti_torch_get_storage_size(void*, int64_t*);
int aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int dtype,
                             int device_type, int device_index, void** tensor) {
  static const auto ordinary = of_torch(&aoti_torch_empty_strided, "aoti_torch_empty_strided");
  if (device_index != kDevice) return 1;
  const int error = ordinary(dims, sizes, strides, dtype, device_type, -1, tensor);
  if (error) return error;
  void* start;
  int64_t bytes;
  aoti_torch_get_data_ptr(*tensor, &start);
  aoti_torch_get_storage_size(*tensor, &bytes);
  on_allocation(start, bytes);
  return 0;
}

int aoti_torch_get_device_index(void*, int* index) {
  *index = kDevice;
  return 0;
}
int aoti_torch_create_device_guard(int index, void** guard) {
  *guard = reinterpret_cast<void*>(static_cast<intptr_t>(std::exchange(current_device, index)));
  return 0;
}
int aoti_torch_delete_device_guard(void* guard) {
  current_device = static_cast<int>(reinterpret_cast<intptr_t>(guard));
  return 0;
}
int aoti_torch_get_current_cuda_stream(int index, void** stream) {
  *stream = index == kDevice ? current_stream : nullptr;
  return 0;
}
}
