// AMX tiles emulated in plain C++, so that tests run the AMX kernels on other CPUs. For tests only (RAREFY_EMULATE in
// CMakeLists.txt). All tiles have 16 rows of 64 bytes.
#pragma once
#include <cstdint>
#include <cstring>

namespace {

struct EmulatedTile {
  uint8_t bytes[16][64];
};
thread_local EmulatedTile emulated_tiles[8];
thread_local uint8_t emulated_config[64];

inline void _tile_storeconfig(void* p) { std::memcpy(p, emulated_config, 64); }
inline void _tile_loadconfig(const void* p) {
  std::memcpy(emulated_config, p, 64);
  std::memset(emulated_tiles, 0, sizeof emulated_tiles);
}
inline void _tile_release() { std::memset(emulated_config, 0, 64); }
inline void _tile_zero(int tile) { emulated_tiles[tile] = {}; }
inline void _tile_loadd(int tile, const void* p, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(emulated_tiles[tile].bytes[r], static_cast<const char*>(p) + r * stride, 64);
}
inline void _tile_stored(int tile, void* p, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(p) + r * stride, emulated_tiles[tile].bytes[r], 64);
}

template <class Sum, class Multiply>
void multiply_emulated(int sum, int a, int b, Multiply&& multiply) {
  for (int r = 0; r < 16; ++r)
    for (int n = 0; n < 16; ++n) {
      Sum s;
      std::memcpy(&s, emulated_tiles[sum].bytes[r] + 4 * n, 4);
      for (int k = 0; k < 16; ++k)
        s = multiply(s, emulated_tiles[a].bytes[r] + 4 * k, emulated_tiles[b].bytes[k] + 4 * n);
      std::memcpy(emulated_tiles[sum].bytes[r] + 4 * n, &s, 4);
    }
}

inline float bf16_at(const uint8_t* p) {
  uint32_t bits = uint32_t(p[0]) << 16 | uint32_t(p[1]) << 24;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline void _tile_dpbsud(int sum, int a, int b) {
  multiply_emulated<int32_t>(sum, a, b, [](int32_t s, const uint8_t* p, const uint8_t* q) {
    for (int i = 0; i < 4; ++i) s += int8_t(p[i]) * q[i];
    return s;
  });
}

inline void _tile_dpbusd(int sum, int a, int b) {
  multiply_emulated<int32_t>(sum, a, b, [](int32_t s, const uint8_t* p, const uint8_t* q) {
    for (int i = 0; i < 4; ++i) s += p[i] * int8_t(q[i]);
    return s;
  });
}

inline void _tile_dpbf16ps(int sum, int a, int b) {
  multiply_emulated<float>(sum, a, b, [](float s, const uint8_t* p, const uint8_t* q) {
    return s + bf16_at(p) * bf16_at(q) + bf16_at(p + 2) * bf16_at(q + 2);
  });
}

}  // namespace
