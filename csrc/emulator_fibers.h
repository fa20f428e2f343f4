// The emulator's machine: blocks one after another, the threads of a block as fibers, collectives where they meet.
//
// ucontext gives each fiber its stack once; switching is _setjmp and _longjmp, which make no system call. Stacks are
// kept from launch to launch.
#pragma once

#include <link.h>
#include <setjmp.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace nibble {
namespace __attribute__((visibility("hidden"))) emulator {  // two such libraries in a process share nothing

constexpr int LANES = 32;
constexpr size_t STACK = 128 << 10;  // bytes, touched only as far as they are used

struct Site {  // a line of a kernel
    const char* file;
    int line;
};

struct Collective {  // who waits in a warp's or a block's
    int arrived = 0;
    const char* name = nullptr;
    Site site = {};
    void* brought[LANES][3] = {};  // by each lane of a warp
};

struct Fiber {
    void* stack = nullptr;
    ucontext_t start;
    jmp_buf resume;
    bool created = false;  // it stands somewhere on its stack
    bool finished = false;
    bool waiting = false;
    uint3 index = {};
};

inline std::string failure;
inline bool reversed = false;
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<Collective> warps;
inline Collective whole_block;
inline int threads = 0;  // of a block
inline int current = 0;  // the running fiber
inline bool failed = false;  // this launch has
inline std::string kernel_name;
inline std::function<void()> body;
inline jmp_buf scheduler;

inline void report(const std::string& text) {
    if (failure.empty()) failure = kernel_name + ": " + text;
    failed = true;
}

inline std::string place(Site site) {
    const char* slash = strrchr(site.file, '/');
    return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

// Called on a fiber: ends the launch.
[[noreturn]] __attribute__((noinline)) inline void fail(const std::string& text, Site site) {
    char where[128];
    snprintf(where, sizeof where, ", block (%u, %u, %u), thread (%u, %u, %u): ", blockIdx.x, blockIdx.y, blockIdx.z,
             threadIdx.x, threadIdx.y, threadIdx.z);
    report(place(site) + where + text);
    _longjmp(scheduler, 1);
}

__attribute__((noinline)) inline void back_to_scheduler() {
    if (_setjmp(fibers[current]->resume) == 0) _longjmp(scheduler, 1);
}

inline void run_bodies() {
    for (;;) {
        body();
        fibers[current]->finished = true;
        back_to_scheduler();
    }
}

// Runs fiber `index` until it waits, ends or fails.
__attribute__((noinline)) inline void switch_to(int index) {
    current = index;
    Fiber& fiber = *fibers[index];
    threadIdx = fiber.index;
    if (_setjmp(scheduler) != 0) return;
    if (fiber.created) _longjmp(fiber.resume, 1);
    fiber.created = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack;
    fiber.start.uc_stack.ss_size = STACK;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, run_bodies, 0);
    setcontext(&fiber.start);
}

// The current thread arrives; true for the last of `count`, which does the work and then calls release.
inline bool arrive(Collective& collective, int count, const char* name, Site site) {
    if (collective.arrived && (collective.name != name || collective.site.line != site.line ||
                               collective.site.file != site.file))
        fail(std::string(name) + " while others wait in " + collective.name + " at " + place(collective.site), site);
    collective.name = name;
    collective.site = site;
    return ++collective.arrived == count;
}

inline void release(Collective& collective, int first, int count) {
    collective.arrived = 0;
    for (int i = first; i < first + count; ++i) fibers[i]->waiting = false;
}

inline void wait() {
    fibers[current]->waiting = true;
    back_to_scheduler();
}

// All lanes of the current warp bring up to three pointers; `work` is called once, with those of all lanes.
template <class Work>
inline void warp_collective(const char* name, Site site, void* a, void* b, void* c, const Work& work) {
    const int warp = current / LANES, lane = current % LANES;
    if ((warp + 1) * LANES > threads) fail(std::string(name) + " in a warp of less than 32 threads", site);
    Collective& collective = warps[warp];
    const bool last = arrive(collective, LANES, name, site);
    collective.brought[lane][0] = a;
    collective.brought[lane][1] = b;
    collective.brought[lane][2] = c;
    if (!last) return wait();
    work(collective.brought);
    release(collective, warp * LANES, LANES);
}

inline void block_barrier(Site site) {
    if (!arrive(whole_block, threads, "sync_threads", site)) return wait();
    release(whole_block, 0, threads);
}

// The library's thread-local memory on this CPU thread, all of it __shared__ arrays.
struct Shared {
    void* start = nullptr;
    size_t bytes = 0;
};

inline Shared shared_memory() {
    static __thread char anchor;
    *static_cast<volatile char*>(&anchor) = 0;  // so that it is allocated
    Shared found;
    auto look = [](dl_phdr_info* info, size_t, void* to) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& segment = info->dlpi_phdr[i];
            const auto start = static_cast<char*>(info->dlpi_tls_data);
            if (segment.p_type != PT_TLS || start == nullptr) continue;
            if (&anchor < start || &anchor >= start + segment.p_memsz) continue;
            *static_cast<Shared*>(to) = {start, segment.p_memsz};
            return 1;
        }
        return 0;
    };
    dl_iterate_phdr(look, &found);
    return found;
}

// What keeps the threads that have not ended from going on.
inline std::string stuck() {
    int ended = 0, first = -1;
    for (int i = 0; i < threads; ++i) {
        ended += fibers[i]->finished;
        if (first < 0 && fibers[i]->waiting) first = i;
    }
    const Collective& warp = warps[first / LANES];
    const Collective& at = warp.arrived ? warp : whole_block;
    char text[256];
    snprintf(text, sizeof text, "thread %d of block (%u, %u, %u) waits for others, %d of %d threads have ended", first,
             blockIdx.x, blockIdx.y, blockIdx.z, ended, threads);
    return place(at.site) + ": " + at.name + ": " + text;
}

inline void run_block() {
    for (auto& warp : warps) warp.arrived = 0;
    whole_block.arrived = 0;
    for (int i = 0; i < threads; ++i) fibers[i]->finished = fibers[i]->waiting = false;
    for (int left = threads; left > 0;) {
        bool moved = false;
        for (int n = 0; n < threads; ++n) {
            const int i = reversed ? threads - 1 - n : n;
            if (fibers[i]->finished || fibers[i]->waiting) continue;
            moved = true;
            switch_to(i);
            if (failed) return;
            left -= fibers[i]->finished;
        }
        if (!moved) return report(stuck());
    }
}

inline void prepare(dim3 block) {
    threads = static_cast<int>(block.x * block.y * block.z);
    warps.resize((threads + LANES - 1) / LANES);
    while (fibers.size() < static_cast<size_t>(threads)) {
        fibers.push_back(std::make_unique<Fiber>());
        fibers.back()->stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    }
    for (uint32_t i = 0; i < static_cast<uint32_t>(threads); ++i)
        fibers[i]->index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
}

// The first of a launch's arguments, as they are written.
inline std::string first_argument(const char* arguments) {
    int depth = 0;
    const char* end = arguments;
    for (; *end && (*end != ',' || depth > 0); ++end) depth += (*end == '<') - (*end == '>');
    return std::string(arguments, end);
}

inline int run_grid(const char* arguments, dim3 grid, dim3 block) {
    kernel_name = first_argument(arguments);
    failed = false;
    const uint64_t size = uint64_t(block.x) * block.y * block.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
    if (size == 0 || size > 1024 || block.z > 64 || blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
        grid.z > 65535) {
        report("the grid or the block is beyond CUDA's limits");
        return NIBBLE_EMULATOR;
    }
    prepare(block);
    gridDim = grid;
    blockDim = block;
    const Shared shared = shared_memory();
    for (uint64_t n = 0; n < blocks && !failed; ++n) {
        const uint64_t i = reversed ? blocks - 1 - n : n;
        blockIdx = {uint32_t(i % grid.x), uint32_t(i / grid.x % grid.y), uint32_t(i / grid.x / grid.y)};
        memset(shared.start, 0xff, shared.bytes);  // NaN in every floating type
        run_block();
    }
    body = nullptr;
    if (!failed) return 0;
    for (auto& fiber : fibers) fiber->created = false;  // what stood on their stacks is dropped
    return NIBBLE_EMULATOR;
}

template <class... P, class... A>
int launch(const char* written, void (*kernel)(P...), dim3 grid, dim3 block, void*, const A&... arguments) {
    static_assert((sizeof(P) + ... + 0) <= 4096, "a kernel takes at most 4096 bytes of parameters");
    body = [=] { kernel(static_cast<P>(arguments)...); };
    return run_grid(written, grid, block);
}

}  // namespace emulator
}  // namespace nibble

#define LAUNCH(...) ::nibble::emulator::launch(#__VA_ARGS__, __VA_ARGS__)
