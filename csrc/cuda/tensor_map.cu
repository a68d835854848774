// Tensor maps are made by the driver, which is found at run time: nothing links libcuda.
#include "hopper.cuh"
#include "launch.cuh"

namespace ep {

#if defined(EP_EMULATED)

int make_tensor_map(TensorMap &map, const void *base, int rank, const uint64_t *extent, const uint64_t *stride,
                    const uint32_t *box) {
  const char *wrong = emulator::encode_tensor_map(map, base, 2, rank, extent, stride, box, true);
  return wrong == nullptr ? EP_OK : fail(EP_DEVICE_ERROR, "a tensor map could not be made: %s", wrong);
}

#else

using Encode = CUresult (*)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *, const cuuint64_t *,
                            const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

static Encode find_encode() {
  void *entry = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(entry) : nullptr;
}

int make_tensor_map(TensorMap &map, const void *base, int rank, const uint64_t *extent, const uint64_t *stride,
                    const uint32_t *box) {
  static const Encode encode = find_encode();
  if (encode == nullptr) return fail(EP_UNSUPPORTED, "the CUDA driver has no cuTensorMapEncodeTiled: it needs CUDA 12");
  const cuuint32_t ones[5] = {1, 1, 1, 1, 1};
  const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, cuuint32_t(rank), const_cast<void *>(base), extent, stride,
                                 box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS
             ? EP_OK
             : fail(EP_DEVICE_ERROR, "cuTensorMapEncodeTiled refuses a tensor of rank %d: error %d", rank, int(result));
}

#endif

}  // namespace ep
