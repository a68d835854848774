// Blockwise 8-bit numbers: each block of x divided by its largest magnitude, then the nearest value of the dynamic code.
//
//   absmax_b = max |x| over block b        q = nearest code to x * (1 / max(absmax_b, 1e-38)), a tie going down
//
// A short last block divides instead and stores the clamped absmax, as bitsandbytes' default backend does.
#include "dynamic_code.h"
#include "enginepost/nf4.h"
#include "isa.h"
#include "nf4_tile.h"
#include "parallel.h"
#include "simd.h"
#include "tensor.h"

namespace ep {
struct Blockwise8 {
  char *x;
  bool bf16;
  int64_t size;
  uint8_t *q;
  float *absmax;
  int shift;
  const DynamicCode *code;  // to quantise
  const float *value;       // 256, to dequantise
  float offset;
};
constexpr int64_t TASK = 1 << 16;  // elements; a multiple of every block size
}  // namespace ep

EP_KERNEL(blockwise8_quantize, Blockwise8)
EP_KERNEL(blockwise8_dequantize, Blockwise8)

#ifndef EP_API

namespace ep {
namespace EP_ISA {

template <class T>
static void quantize(const Blockwise8 &a) {
  const T *x = reinterpret_cast<const T *>(a.x);
  const int64_t block_size = int64_t(1) << a.shift;
  parallel_for((a.size + TASK - 1) / TASK, [&](int64_t task, int) {
    const int64_t end = a.size - task * TASK < TASK ? a.size : (task + 1) * TASK;
    for (int64_t from = task * TASK; from < end; from += block_size) {
      const bool whole = a.size - from >= block_size;
      const int64_t count = whole ? block_size : a.size - from;
      const float most = magnitude(x + from, count), divisor = most < 1e-38f ? 1e-38f : most, factor = 1.f / divisor;
      a.absmax[from >> a.shift] = whole ? most : divisor;
      if (whole) {
        const auto take = [&](int64_t i) {
          const V at = load(x + from + i) * set1(factor);
          return where_finite(at, at, set1(__builtin_nanf("")));  // a NaN without a payload
        };
        if (a.code->zero > 0) {
          encode(Encoder<true, false>(*a.code), count, a.q + from, take);
        } else {
          encode(Encoder<false, false>(*a.code), count, a.q + from, take);
        }
      } else {
        for (int64_t i = from; i < from + count; i++) a.q[i] = uint8_t(nearest(*a.code, to_float(x[i]) / divisor));
      }
    }
  });
}

void blockwise8_quantize(const Blockwise8 &a) { a.bf16 ? quantize<bf16>(a) : quantize<float>(a); }

template <class T>
static void dequantize(const Blockwise8 &a) {
  T *out = reinterpret_cast<T *>(a.x);
  parallel_for((a.size + TASK - 1) / TASK, [&](int64_t task, int) {
    const int64_t end = a.size - task * TASK < TASK ? a.size : (task + 1) * TASK;
    for (int64_t from = task * TASK; from < end;) {
      const float scale = a.absmax[from >> a.shift];
      const int64_t stop = from + (int64_t(1) << a.shift) < end ? from + (int64_t(1) << a.shift) : end;
      for (; from + N <= stop; from += N) {
        store(out + from, pick(a.value, a.q + from) * set1(scale) + set1(a.offset));
      }
      for (; from < stop; from++) from_float(a.value[a.q[from]] * scale + a.offset, out + from);
    }
  });
}

void blockwise8_dequantize(const Blockwise8 &a) { a.bf16 ? dequantize<bf16>(a) : dequantize<float>(a); }

}  // namespace EP_ISA
}  // namespace ep

#else

#include <cmath>

namespace ep {

// Literals, as bitsandbytes makes them with torch: other arithmetic gives other last bits.
// clang-format off
static const float SIGNED[256] = {
    -0.99296874f, -0.9789063f, -0.96484375f, -0.9507812f, -0.93671876f, -0.92265624f, -0.9085938f, -0.89453125f, -0.8804687f,
    -0.86640626f, -0.85234374f, -0.8382813f, -0.82421875f, -0.8101562f, -0.79609376f, -0.78203124f, -0.7679688f, -0.75390625f,
    -0.7398437f, -0.72578126f, -0.7117188f, -0.6976563f, -0.68359375f, -0.6695312f, -0.65546876f, -0.6414063f, -0.6273438f,
    -0.61328125f, -0.5992187f, -0.58515626f, -0.5710938f, -0.5570313f, -0.54296875f, -0.5289062f, -0.5148437f, -0.50078124f,
    -0.4867187f, -0.47265625f, -0.45859373f, -0.44453126f, -0.43046874f, -0.41640624f, -0.40234375f, -0.38828123f, -0.37421876f,
    -0.36015624f, -0.34609374f, -0.33203125f, -0.31796873f, -0.30390626f, -0.28984374f, -0.27578127f, -0.26171875f,
    -0.24765624f, -0.23359375f, -0.21953125f, -0.20546874f, -0.19140625f, -0.17734376f, -0.16328125f, -0.14921875f,
    -0.13515624f, -0.12109375f, -0.107031256f, -0.09859375f, -0.09578126f, -0.092968754f, -0.09015625f, -0.08734375f,
    -0.08453125f, -0.08171876f, -0.07890625f, -0.07609375f, -0.07328125f, -0.070468746f, -0.067656256f, -0.06484375f,
    -0.06203125f, -0.059218753f, -0.05640625f, -0.05359375f, -0.05078125f, -0.04796875f, -0.04515625f, -0.042343747f,
    -0.03953125f, -0.036718752f, -0.03390625f, -0.03109375f, -0.028281251f, -0.02546875f, -0.02265625f, -0.019843752f,
    -0.01703125f, -0.01421875f, -0.01140625f, -0.00971875f, -0.009156249f, -0.00859375f, -0.00803125f, -0.00746875f,
    -0.00690625f, -0.00634375f, -0.00578125f, -0.0052187503f, -0.0046562497f, -0.00409375f, -0.0035312497f, -0.00296875f,
    -0.00240625f, -0.00184375f, -0.0012812499f, -9.437501e-04f, -8.3125e-04f, -7.1875006e-04f, -6.062501e-04f, -4.9375003e-04f,
    -3.8125002e-04f, -2.6875004e-04f, -1.5625001e-04f, -8.875e-05f, -6.625e-05f, -4.375e-05f, -2.1249998e-05f, -7.75e-06f,
    -3.2500002e-06f, -5.5000004e-07f, 0.f, 5.5000004e-07f, 3.2500002e-06f, 7.75e-06f, 2.1249998e-05f, 4.375e-05f, 6.625e-05f,
    8.875e-05f, 1.5625001e-04f, 2.6875004e-04f, 3.8125002e-04f, 4.9375003e-04f, 6.062501e-04f, 7.1875006e-04f, 8.3125e-04f,
    9.437501e-04f, 0.0012812499f, 0.00184375f, 0.00240625f, 0.00296875f, 0.0035312497f, 0.00409375f, 0.0046562497f,
    0.0052187503f, 0.00578125f, 0.00634375f, 0.00690625f, 0.00746875f, 0.00803125f, 0.00859375f, 0.009156249f, 0.00971875f,
    0.01140625f, 0.01421875f, 0.01703125f, 0.019843752f, 0.02265625f, 0.02546875f, 0.028281251f, 0.03109375f, 0.03390625f,
    0.036718752f, 0.03953125f, 0.042343747f, 0.04515625f, 0.04796875f, 0.05078125f, 0.05359375f, 0.05640625f, 0.059218753f,
    0.06203125f, 0.06484375f, 0.067656256f, 0.070468746f, 0.07328125f, 0.07609375f, 0.07890625f, 0.08171876f, 0.08453125f,
    0.08734375f, 0.09015625f, 0.092968754f, 0.09578126f, 0.09859375f, 0.107031256f, 0.12109375f, 0.13515624f, 0.14921875f,
    0.16328125f, 0.17734376f, 0.19140625f, 0.20546874f, 0.21953125f, 0.23359375f, 0.24765624f, 0.26171875f, 0.27578127f,
    0.28984374f, 0.30390626f, 0.31796873f, 0.33203125f, 0.34609374f, 0.36015624f, 0.37421876f, 0.38828123f, 0.40234375f,
    0.41640624f, 0.43046874f, 0.44453126f, 0.45859373f, 0.47265625f, 0.4867187f, 0.50078124f, 0.5148437f, 0.5289062f,
    0.54296875f, 0.5570313f, 0.5710938f, 0.58515626f, 0.5992187f, 0.61328125f, 0.6273438f, 0.6414063f, 0.65546876f, 0.6695312f,
    0.68359375f, 0.6976563f, 0.7117188f, 0.72578126f, 0.7398437f, 0.75390625f, 0.7679688f, 0.78203124f, 0.79609376f, 0.8101562f,
    0.82421875f, 0.8382813f, 0.85234374f, 0.86640626f, 0.8804687f, 0.89453125f, 0.9085938f, 0.92265624f, 0.93671876f,
    0.9507812f, 0.96484375f, 0.9789063f, 0.99296874f, 1.f,};
static const float UNSIGNED[256] = {
    0.f, 3.2500003e-07f, 7.75e-07f, 2.1249998e-06f, 4.3749997e-06f, 6.625e-06f, 8.874999e-06f, 1.5624999e-05f, 2.6875001e-05f,
    3.8125e-05f, 4.9374998e-05f, 6.0625003e-05f, 7.1875e-05f, 8.312499e-05f, 9.4375e-05f, 1.28125e-04f, 1.84375e-04f,
    2.4062501e-04f, 2.9687502e-04f, 3.5312498e-04f, 4.0937503e-04f, 4.6562502e-04f, 5.2187504e-04f, 5.78125e-04f, 6.34375e-04f,
    6.9062505e-04f, 7.46875e-04f, 8.031251e-04f, 8.5937505e-04f, 9.15625e-04f, 9.7187504e-04f, 0.001140625f, 0.001421875f,
    0.001703125f, 0.001984375f, 0.002265625f, 0.0025468748f, 0.002828125f, 0.0031093748f, 0.0033906251f, 0.003671875f,
    0.003953125f, 0.0042343745f, 0.004515625f, 0.0047968747f, 0.005078125f, 0.005359375f, 0.0056406246f, 0.005921875f,
    0.0062031248f, 0.006484375f, 0.0067656254f, 0.0070468746f, 0.007328125f, 0.0076093744f, 0.007890625f, 0.008171875f,
    0.008453124f, 0.008734375f, 0.009015624f, 0.0092968745f, 0.009578126f, 0.009859375f, 0.010703126f, 0.012109376f,
    0.013515624f, 0.014921876f, 0.016328124f, 0.017734377f, 0.019140625f, 0.020546874f, 0.021953126f, 0.023359375f,
    0.024765624f, 0.026171876f, 0.027578129f, 0.028984373f, 0.030390626f, 0.031796873f, 0.033203125f, 0.034609374f,
    0.036015626f, 0.03742188f, 0.038828123f, 0.040234376f, 0.041640624f, 0.043046873f, 0.044453125f, 0.045859374f, 0.047265626f,
    0.04867187f, 0.050078124f, 0.051484372f, 0.052890625f, 0.054296877f, 0.05570313f, 0.057109382f, 0.058515627f, 0.059921872f,
    0.061328124f, 0.06273438f, 0.06414063f, 0.06554688f, 0.06695312f, 0.068359375f, 0.06976563f, 0.07117188f, 0.072578125f,
    0.07398438f, 0.07539063f, 0.07679688f, 0.07820313f, 0.07960938f, 0.081015624f, 0.08242188f, 0.08382813f, 0.085234374f,
    0.086640626f, 0.08804687f, 0.08945312f, 0.090859376f, 0.09226563f, 0.09367188f, 0.095078126f, 0.09648438f, 0.09789063f,
    0.099296875f, 0.103515625f, 0.11054687f, 0.11757813f, 0.12460937f, 0.13164061f, 0.13867188f, 0.14570314f, 0.15273437f,
    0.15976563f, 0.16679686f, 0.17382812f, 0.18085939f, 0.18789062f, 0.19492188f, 0.20195311f, 0.20898438f, 0.21601564f,
    0.22304687f, 0.23007813f, 0.23710936f, 0.24414062f, 0.25117186f, 0.25820312f, 0.26523438f, 0.2722656f, 0.27929688f,
    0.28632814f, 0.29335937f, 0.3003906f, 0.30742186f, 0.31445312f, 0.3214844f, 0.32851562f, 0.33554685f, 0.3425781f,
    0.34960938f, 0.35664064f, 0.36367187f, 0.3707031f, 0.37773436f, 0.38476562f, 0.3917969f, 0.39882812f, 0.40585935f,
    0.4128906f, 0.41992188f, 0.42695314f, 0.43398437f, 0.4410156f, 0.44804686f, 0.45507812f, 0.4621094f, 0.46914062f,
    0.47617185f, 0.4832031f, 0.49023438f, 0.4972656f, 0.5042969f, 0.5113281f, 0.51835936f, 0.5253906f, 0.5324218f, 0.53945315f,
    0.54648435f, 0.5535157f, 0.5605469f, 0.56757814f, 0.5746094f, 0.5816406f, 0.5886719f, 0.5957031f, 0.6027344f, 0.60976565f,
    0.61679685f, 0.6238282f, 0.6308594f, 0.63789064f, 0.6449219f, 0.6519531f, 0.6589844f, 0.6660156f, 0.6730469f, 0.68007815f,
    0.68710935f, 0.6941407f, 0.7011719f, 0.70820314f, 0.7152344f, 0.7222656f, 0.7292969f, 0.7363281f, 0.7433594f, 0.75039065f,
    0.75742185f, 0.7644532f, 0.7714844f, 0.7785156f, 0.7855469f, 0.7925781f, 0.7996094f, 0.8066406f, 0.8136718f, 0.82070315f,
    0.82773435f, 0.8347657f, 0.8417969f, 0.8488281f, 0.8558594f, 0.8628906f, 0.8699219f, 0.8769531f, 0.8839843f, 0.89101565f,
    0.89804685f, 0.9050782f, 0.9121094f, 0.9191406f, 0.9261719f, 0.9332031f, 0.9402344f, 0.9472656f, 0.9542968f, 0.96132815f,
    0.96835935f, 0.9753907f, 0.9824219f, 0.9894531f, 0.9964844f, 1.f,};
// clang-format on

static float cell_end(int cell) {  // the magnitude at which a cell begins
  const uint32_t bits = uint32_t(cell + CELL_FIRST) << CELL_BITS;
  float f;
  std::memcpy(&f, &bits, 4);
  return cell == 0 ? 0.f : cell >= CELLS - 1 ? INFINITY : f;
}

static int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// The tables of Encoder and Decoder. Decade d has `first` << d codes of either sign, from `code` on. Its codes n from zero are
// those of which 2 n (where there are signs) or n + 1 (where there are none) has the exponent d + 1.
static void fill_classes(DynamicCode &c) {
  const bool has_signs = c.zero > 0;
  const int first = has_signs ? 1 : 2;
  for (int d = 0, code = c.zero + 1; d < 7; code += first << d, d++) {
    const int count = first << d, last = code + count - 1;
    const double step = count == 1 ? c.value[code] : (double(c.value[last]) - c.value[code]) / (count - 1);
    c.border[d] = bits_of(c.midpoint[last]);
    c.highest[d] = c.highest[d + 8] = uint8_t(last - c.zero);
    c.per_code[d] = float(1 / step);
    c.at_zero[d] = float(code - c.zero - c.value[code] / step + 0.5);
    c.size_of_code[d] = float(has_signs ? step / 2 : step);
    c.size_at_zero[d] = float(c.value[code] - step * (has_signs ? code - c.zero : code + 1));
  }
  // Class 0 has zero too, so its line goes through its midpoints; where there are signs the second is the border, and like the
  // other borders lies two codes above the highest midpoint.
  c.per_code[0] = (has_signs ? 2.f : 1.f) / (c.midpoint[c.zero + 1] - c.midpoint[c.zero]);
  c.at_zero[0] = 1.f - c.midpoint[c.zero] * c.per_code[0];
  if (has_signs) {
    c.size_of_code[7] = 0.f, c.size_at_zero[7] = 1.f;
  } else {  // zero, which is counted 1, and one, which is counted 256
    c.size_of_code[7] = 1.f / 255, c.size_at_zero[7] = -c.size_of_code[7];
  }
  c.border[7] = INT32_MAX;
  c.per_code[7] = 0.f, c.at_zero[7] = float(255 - c.zero) + 0.5f, c.highest[7] = c.highest[15] = uint8_t(255 - c.zero);
  for (int i = 3; i < 16; i++) {
    while (c.border[c.kind[i]] < (0x30 | i) << 24) c.kind[i]++;
  }
}

static DynamicCode *build(const float *value) {
  DynamicCode *c = new DynamicCode{};
  c->value = value;
  for (int i = 0; i < 255; i++) c->midpoint[i] = (value[i] + value[i + 1]) / 2;
  c->midpoint[255] = INFINITY;
  for (int cell = 0; cell < CELLS; cell++) {
    int positive = 0, negative = 0;
    while (c->midpoint[positive] < cell_end(cell)) positive++;
    while (c->midpoint[negative] <= -cell_end(cell + 1)) negative++;
    c->first[cell] = uint8_t(positive);
    c->first[CELLS + cell] = uint8_t(negative);
  }
  while (value[c->zero] != 0.f) c->zero++;
  fill_classes(*c);
  c->shift[0] = 0.5f;
  for (int kind = 1, code = c->zero + 1; kind < 8; kind++) {
    const int count = (c->zero == 0 ? 2 : 1) << (kind - 1);  // 1, 2, 4 ... values of either sign; twice that without
    const float step = count == 1 ? INFINITY : (value[code + count - 1] - value[code]) / float(count - 1);
    std::memcpy(&c->begins[kind - 1], &c->midpoint[code - 1], 4);
    c->inverse[kind] = 1 / step;
    c->shift[kind] = 0.5f - value[code] / step;
    c->base[kind] = code - c->zero;
    c->last[kind] = count - 1;
    code += count;
  }
  std::memcpy(&c->begins[7], &c->midpoint[254], 4);
  return c;
}

const DynamicCode &dynamic_code(bool is_signed) {
  static const DynamicCode *codes[2] = {build(UNSIGNED), build(SIGNED)};
  return *codes[is_signed];
}

}  // namespace ep

#include "device_nf4.h"

using namespace ep;

constexpr unsigned NUMBERS = FLOATS | GPU;

extern "C" const float *ep_dynamic_code(int is_signed) { return is_signed ? SIGNED : UNSIGNED; }

extern "C" int ep_blockwise8_quantize(const DLTensor *x, const DLTensor *q, const DLTensor *absmax, int64_t blocksize,
                                      int is_signed, void *stream) {
  const char *fn = "blockwise8_quantize";
  EP_VIEW(xv, x, 1, NUMBERS);
  EP_VIEW(qv, q, 1, U8 | GPU);
  EP_VIEW(av, absmax, 1, F32 | GPU);
  const int shift = nf4_shift(blocksize, fn);
  if (shift < 0) return EP_INVALID_ARGUMENT;
  const int64_t blocks = (xv.size + blocksize - 1) / blocksize;
  EP_REQUIRE(qv.size == xv.size && av.size == blocks, "%s: %lld elements need as many codes and %lld scales, got %lld and %lld", fn,
             (long long)xv.size, (long long)blocks, (long long)qv.size, (long long)av.size);
  if (xv.size == 0) return EP_OK;
  if (int status = check_one_device(fn, {&xv, &qv, &av})) return status;
#if defined(EP_GPU)
  if (on_gpu(xv.device)) {
    cuda::UseDevice use(xv.device.device_id);
    return cuda::blockwise8_quantize({xv.data, kind_of(xv.dtype), xv.size, reinterpret_cast<uint8_t *>(qv.data),
                                      reinterpret_cast<float *>(av.data), shift, dynamic_code(is_signed != 0).midpoint},
                                     stream);
  }
#endif
  (void)stream;
  Blockwise8 args{xv.data,
                  xv.dtype == BF16,
                  xv.size,
                  reinterpret_cast<uint8_t *>(qv.data),
                  reinterpret_cast<float *>(av.data),
                  shift,
                  &dynamic_code(is_signed != 0),
                  nullptr,
                  0.f};
  EP_RUN(blockwise8_quantize, args);
  return EP_OK;
}

extern "C" int ep_blockwise8_dequantize(const DLTensor *q, const DLTensor *absmax, const DLTensor *code, const DLTensor *out,
                                        int64_t blocksize, double offset, void *stream) {
  const char *fn = "blockwise8_dequantize";
  EP_VIEW(qv, q, 1, U8 | GPU);
  EP_VIEW(av, absmax, 1, F32 | GPU);
  EP_VIEW(cv, code, 1, F32 | GPU);
  EP_VIEW(ov, out, 1, NUMBERS);
  const int shift = nf4_shift(blocksize, fn);
  if (shift < 0) return EP_INVALID_ARGUMENT;
  const int64_t blocks = (qv.size + blocksize - 1) / blocksize;
  EP_REQUIRE(ov.size == qv.size && av.size == blocks && cv.size == 256,
             "%s: %lld codes need as many outputs, %lld scales and a code of 256, got %lld, %lld and %lld", fn, (long long)qv.size,
             (long long)blocks, (long long)ov.size, (long long)av.size, (long long)cv.size);
  if (qv.size == 0) return EP_OK;
  if (int status = check_one_device(fn, {&qv, &av, &cv, &ov})) return status;
#if defined(EP_GPU)
  if (on_gpu(qv.device)) {
    cuda::UseDevice use(qv.device.device_id);
    return cuda::blockwise8_dequantize(
        {reinterpret_cast<const uint8_t *>(qv.data), reinterpret_cast<const float *>(av.data),
         reinterpret_cast<const float *>(cv.data), qv.size, ov.data, kind_of(ov.dtype), shift, float(offset)},
        stream);
  }
#endif
  (void)stream;
  Blockwise8 args{ov.data,
                  ov.dtype == BF16,
                  qv.size,
                  reinterpret_cast<uint8_t *>(qv.data),
                  reinterpret_cast<float *>(av.data),
                  shift,
                  nullptr,
                  reinterpret_cast<const float *>(cv.data),
                  float(offset)};
  EP_RUN(blockwise8_dequantize, args);
  return EP_OK;
}

#endif
