// A stand-in for NVIDIA's management library, libnvidia-ml.so.1, for tests. It has
// the functions that the helper calls, with the interface of NVIDIA's own nvml.h,
// and does what the files in the folder FAKE_NVML (by default /etc/fake-nvml) say:
//
//   script     lines of KEY VALUE: count, driver, name, capable, cc, devtools,
//              multigpu, ready, ecc, links, fabric; and error.FUNCTION RETURN,
//              hang.FUNCTION 1, crash.FUNCTION 1, print.FUNCTION 1, all of them
//              after.FUNCTION calls that went well
//   gpuN.pem   the certificate chain of GPU N
//   gpuN.key   its private key on P-384, 48 bytes, big endian
//   gpuN.spdm  the SPDM response of its reports, without the signature
//
// The script is read again with every call, so that a test can change its mind.
// Reports are really signed, over the caller's nonce.

#include <nvml.h>

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// --- SHA-384 (FIPS 180-4) ---

static const uint64_t K[80] = {
    0x428a2f98d728ae22, 0x7137449123ef65cd, 0xb5c0fbcfec4d3b2f, 0xe9b5dba58189dbbc, 0x3956c25bf348b538,
    0x59f111f1b605d019, 0x923f82a4af194f9b, 0xab1c5ed5da6d8118, 0xd807aa98a3030242, 0x12835b0145706fbe,
    0x243185be4ee4b28c, 0x550c7dc3d5ffb4e2, 0x72be5d74f27b896f, 0x80deb1fe3b1696b1, 0x9bdc06a725c71235,
    0xc19bf174cf692694, 0xe49b69c19ef14ad2, 0xefbe4786384f25e3, 0x0fc19dc68b8cd5b5, 0x240ca1cc77ac9c65,
    0x2de92c6f592b0275, 0x4a7484aa6ea6e483, 0x5cb0a9dcbd41fbd4, 0x76f988da831153b5, 0x983e5152ee66dfab,
    0xa831c66d2db43210, 0xb00327c898fb213f, 0xbf597fc7beef0ee4, 0xc6e00bf33da88fc2, 0xd5a79147930aa725,
    0x06ca6351e003826f, 0x142929670a0e6e70, 0x27b70a8546d22ffc, 0x2e1b21385c26c926, 0x4d2c6dfc5ac42aed,
    0x53380d139d95b3df, 0x650a73548baf63de, 0x766a0abb3c77b2a8, 0x81c2c92e47edaee6, 0x92722c851482353b,
    0xa2bfe8a14cf10364, 0xa81a664bbc423001, 0xc24b8b70d0f89791, 0xc76c51a30654be30, 0xd192e819d6ef5218,
    0xd69906245565a910, 0xf40e35855771202a, 0x106aa07032bbd1b8, 0x19a4c116b8d2d0c8, 0x1e376c085141ab53,
    0x2748774cdf8eeb99, 0x34b0bcb5e19b48a8, 0x391c0cb3c5c95a63, 0x4ed8aa4ae3418acb, 0x5b9cca4f7763e373,
    0x682e6ff3d6b2b8a3, 0x748f82ee5defb2fc, 0x78a5636f43172f60, 0x84c87814a1f0ab72, 0x8cc702081a6439ec,
    0x90befffa23631e28, 0xa4506cebde82bde9, 0xbef9a3f7b2c67915, 0xc67178f2e372532b, 0xca273eceea26619c,
    0xd186b8c721c0c207, 0xeada7dd6cde0eb1e, 0xf57d4f7fee6ed178, 0x06f067aa72176fba, 0x0a637dc5a2c898a6,
    0x113f9804bef90dae, 0x1b710b35131c471b, 0x28db77f523047d84, 0x32caab7b40c72493, 0x3c9ebe0a15c9bebc,
    0x431d67c49c100d4c, 0x4cc5d4becb3e42b6, 0x597f299cfc657e2a, 0x5fcb6fab3ad6faec, 0x6c44198c4a475817};

static uint64_t ror(uint64_t x, int n) { return x >> n | x << (64 - n); }

static void sha384(const uint8_t *data, size_t size, uint8_t out[48]) {
    uint64_t h[8] = {0xcbbb9d5dc1059ed8, 0x629a292a367cd507, 0x9159015a3070dd17, 0x152fecd8f70e5939,
                     0x67332667ffc00b31, 0x8eb44a8768581511, 0xdb0c2e0d64f98fa7, 0x47b5481dbefa4fa4};
    size_t padded = (size + 17 + 127) / 128 * 128;
    for (size_t at = 0; at < padded; at += 128) {
        uint64_t w[80];
        for (int i = 0; i < 16; i++) {
            w[i] = 0;
            for (int j = 0; j < 8; j++) {
                size_t p = at + 8 * i + j;
                uint8_t b = p < size ? data[p] : p == size ? 0x80 : p >= padded - 8 ? (uint8_t)((uint64_t)size * 8 >> 8 * (padded - 1 - p)) : 0;
                w[i] = w[i] << 8 | b;
            }
        }
        for (int i = 16; i < 80; i++)
            w[i] = w[i - 16] + (ror(w[i - 15], 1) ^ ror(w[i - 15], 8) ^ w[i - 15] >> 7) + w[i - 7] + (ror(w[i - 2], 19) ^ ror(w[i - 2], 61) ^ w[i - 2] >> 6);
        uint64_t v[8];
        memcpy(v, h, sizeof v);
        for (int i = 0; i < 80; i++) {
            uint64_t a = v[7] + (ror(v[4], 14) ^ ror(v[4], 18) ^ ror(v[4], 41)) + ((v[4] & v[5]) ^ (~v[4] & v[6])) + K[i] + w[i];
            uint64_t b = (ror(v[0], 28) ^ ror(v[0], 34) ^ ror(v[0], 39)) + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
            memmove(v + 1, v, 7 * sizeof *v);
            v[4] += a;
            v[0] = a + b;
        }
        for (int i = 0; i < 8; i++) h[i] += v[i];
    }
    for (int i = 0; i < 48; i++) out[i] = (uint8_t)(h[i / 8] >> 8 * (7 - i % 8));
}

// --- ECDSA on P-384 (FIPS 186-5), slow and leaky: it signs for tests only ---

typedef struct { uint64_t w[6]; } num; // little endian words

static const num P = {{0x00000000ffffffff, 0xffffffff00000000, 0xfffffffffffffffe, ~0ull, ~0ull, ~0ull}};
static const num N = {{0xecec196accc52973, 0x581a0db248b0a77a, 0xc7634d81f4372ddf, ~0ull, ~0ull, ~0ull}};
static const num GX = {{0x3a545e3872760ab7, 0x5502f25dbf55296c, 0x59f741e082542a38, 0x6e1d3b628ba79b98, 0x8eb1c71ef320ad74, 0xaa87ca22be8b0537}};
static const num GY = {{0x7a431d7c90ea0e5f, 0x0a60b1ce1d7e819d, 0xe9da3113b5f0b8c0, 0xf8f41dbd289a147c, 0x5d9e98bf9292dc29, 0x3617de4a96262c6f}};

static int add(num *a, const num *b) { // returns the carry
    unsigned __int128 c = 0;
    for (int i = 0; i < 6; i++) { c += (unsigned __int128)a->w[i] + b->w[i]; a->w[i] = (uint64_t)c; c >>= 64; }
    return (int)c;
}
static int sub(num *a, const num *b) { // returns the borrow
    unsigned __int128 c = 0;
    for (int i = 0; i < 6; i++) { c = (unsigned __int128)a->w[i] - b->w[i] - (uint64_t)(c & 1); a->w[i] = (uint64_t)c; c = c >> 64 & 1; }
    return (int)c;
}
static int less(const num *a, const num *b) {
    for (int i = 5; i >= 0; i--) if (a->w[i] != b->w[i]) return a->w[i] < b->w[i];
    return 0;
}
static int zero(const num *a) { uint64_t x = 0; for (int i = 0; i < 6; i++) x |= a->w[i]; return x == 0; }
static int bit(const num *a, int i) { return a->w[i / 64] >> i % 64 & 1; }
static num addm(num a, const num *b, const num *m) { if (add(&a, b) || !less(&a, m)) sub(&a, m); return a; }
static num subm(num a, const num *b, const num *m) { if (sub(&a, b)) add(&a, m); return a; }
static num mulm(const num *a, const num *b, const num *m) {
    num r = {{0}};
    for (int i = 383; i >= 0; i--) { r = addm(r, &r, m); if (bit(a, i)) r = addm(r, b, m); }
    return r;
}
static num inverse(const num *a, const num *m) { // a^(m-2)
    num e = *m, two = {{2}}, r = {{1}};
    sub(&e, &two);
    for (int i = 383; i >= 0; i--) { r = mulm(&r, &r, m); if (bit(&e, i)) r = mulm(&r, a, m); }
    return r;
}

typedef struct { num x, y, z; } point; // Jacobian; z = 0 is infinity

static point dbl(point p) {
    if (zero(&p.z)) return p;
    num z2 = mulm(&p.z, &p.z, &P), y2 = mulm(&p.y, &p.y, &P), s = mulm(&p.x, &y2, &P);
    num l = subm(p.x, &z2, &P), r = addm(p.x, &z2, &P), m = mulm(&l, &r, &P), t = addm(m, &m, &P);
    m = addm(t, &m, &P); // 3(x - z²)(x + z²)
    s = addm(s, &s, &P); s = addm(s, &s, &P);
    point q;
    q.x = mulm(&m, &m, &P); q.x = subm(q.x, &s, &P); q.x = subm(q.x, &s, &P);
    num y4 = mulm(&y2, &y2, &P);
    for (int i = 0; i < 3; i++) y4 = addm(y4, &y4, &P);
    t = subm(s, &q.x, &P); q.y = mulm(&m, &t, &P); q.y = subm(q.y, &y4, &P);
    q.z = mulm(&p.y, &p.z, &P); q.z = addm(q.z, &q.z, &P);
    return q;
}
static point addp(point p, const num *x, const num *y) { // p + (x, y), neither equal nor opposite
    if (zero(&p.z)) { point g = {*x, *y, {{1}}}; return g; }
    num z2 = mulm(&p.z, &p.z, &P), z3 = mulm(&z2, &p.z, &P), u = mulm(x, &z2, &P), s = mulm(y, &z3, &P);
    num h = subm(u, &p.x, &P), r = subm(s, &p.y, &P), h2 = mulm(&h, &h, &P), h3 = mulm(&h2, &h, &P), v = mulm(&p.x, &h2, &P);
    point q;
    q.x = mulm(&r, &r, &P); q.x = subm(q.x, &h3, &P); q.x = subm(q.x, &v, &P); q.x = subm(q.x, &v, &P);
    num t = subm(v, &q.x, &P), w = mulm(&p.y, &h3, &P);
    q.y = mulm(&r, &t, &P); q.y = subm(q.y, &w, &P);
    q.z = mulm(&p.z, &h, &P);
    return q;
}

static num load(const uint8_t *b) {
    num r = {{0}};
    for (int i = 0; i < 48; i++) r.w[(47 - i) / 8] |= (uint64_t)b[i] << 8 * ((47 - i) % 8);
    return r;
}
static void store(const num *a, uint8_t *b) {
    for (int i = 0; i < 48; i++) b[i] = (uint8_t)(a->w[(47 - i) / 8] >> 8 * ((47 - i) % 8));
}

static void sign(const uint8_t key[48], const uint8_t *data, size_t size, uint8_t out[96]) {
    uint8_t seed[97], digest[48], random[48];
    sha384(data, size, digest);
    memcpy(seed, key, 48);
    memcpy(seed + 48, digest, 48);
    num d = load(key), e = load(digest);
    if (!less(&e, &N)) sub(&e, &N);
    for (seed[96] = 0;; seed[96]++) {
        sha384(seed, sizeof seed, random);
        num k = load(random);
        if (zero(&k) || !less(&k, &N)) continue;
        point q = {{{0}}, {{0}}, {{0}}};
        for (int i = 383; i >= 0; i--) { q = dbl(q); if (bit(&k, i)) q = addp(q, &GX, &GY); }
        num zi = inverse(&q.z, &P), z2 = mulm(&zi, &zi, &P), r = mulm(&q.x, &z2, &P);
        if (!less(&r, &N)) sub(&r, &N);
        num t = mulm(&r, &d, &N), ki = inverse(&k, &N);
        t = addm(t, &e, &N);
        num s = mulm(&ki, &t, &N);
        if (zero(&r) || zero(&s)) continue;
        store(&r, out);
        store(&s, out + 48);
        return;
    }
}

// --- the script ---

static size_t readfile(const char *name, uint8_t *out, size_t limit) {
    char path[512];
    const char *dir = getenv("FAKE_NVML");
    snprintf(path, sizeof path, "%s/%s", dir ? dir : "/etc/fake-nvml", name);
    FILE *f = fopen(path, "re");
    if (!f) return 0;
    size_t n = fread(out, 1, limit, f);
    fclose(f);
    return n;
}

static const char *value(const char *key, const char *otherwise) {
    static char text[8192], found[128];
    size_t n = readfile("script", (uint8_t *)text, sizeof text - 1);
    text[n] = 0;
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
        size_t k = strlen(key);
        if (strncmp(line, key, k) == 0 && line[k] == ' ') {
            snprintf(found, sizeof found, "%s", line + k + 1);
            return found;
        }
    }
    return otherwise;
}
static unsigned number(const char *key, unsigned otherwise) {
    const char *v = value(key, NULL);
    return v ? (unsigned)strtoul(v, NULL, 0) : otherwise;
}

// misbehave does what the script says that a function does in place of its work.
static nvmlReturn_t misbehave(const char *function) {
    static struct { const char *function; unsigned calls; } seen[64];
    char key[128];
    snprintf(key, sizeof key, "after.%s", function);
    unsigned after = number(key, 0);
    for (int i = 0; after && i < 64; i++) {
        if (!seen[i].function) seen[i].function = function;
        if (seen[i].function != function) continue;
        if (seen[i].calls++ < after) return NVML_SUCCESS;
        break;
    }
    snprintf(key, sizeof key, "print.%s", function);
    if (number(key, 0)) { printf("%s says hello\n{\"id\":1,\"code\":\"ok\"}\n", function); fflush(stdout); }
    snprintf(key, sizeof key, "hang.%s", function);
    while (number(key, 0)) sleep(1);
    snprintf(key, sizeof key, "crash.%s", function);
    if (number(key, 0)) { volatile int *volatile nowhere = NULL; *nowhere = 1; }
    snprintf(key, sizeof key, "error.%s", function);
    return (nvmlReturn_t)number(key, NVML_SUCCESS);
}
#define BEGIN do { nvmlReturn_t r = misbehave(__func__); if (r != NVML_SUCCESS) return r; } while (0)

static unsigned index_of(nvmlDevice_t d) { return (unsigned)((uintptr_t)d.handle - 1); }

// --- the library ---

nvmlReturn_t nvmlInit_v2(void) { BEGIN; return NVML_SUCCESS; }
nvmlReturn_t nvmlShutdown(void) { return NVML_SUCCESS; }
const char *nvmlErrorString(nvmlReturn_t r) { (void)r; return "an error"; }

nvmlReturn_t nvmlSystemGetDriverVersion(char *version, unsigned int length) {
    BEGIN;
    snprintf(version, length, "%s", value("driver", "999.10.01"));
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int *count) { BEGIN; *count = number("count", 1); return NVML_SUCCESS; }
nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int i, nvmlDevice_t *d) {
    BEGIN;
    if (i >= number("count", 1)) return NVML_ERROR_INVALID_ARGUMENT;
    d->handle = (struct nvmlDevice_st *)(uintptr_t)(i + 1);
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t d, char *uuid, unsigned int length) {
    BEGIN;
    snprintf(uuid, length, "GPU-%08x-0000-0000-0000-000000000000", index_of(d));
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t d, char *name, unsigned int length) {
    BEGIN;
    (void)d;
    snprintf(name, length, "%s", value("name", "NVIDIA H100 TEST"));
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetVbiosVersion(nvmlDevice_t d, char *version, unsigned int length) {
    BEGIN;
    (void)d;
    snprintf(version, length, "%s", value("vbios", "96.00.AA.00.01"));
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t d, nvmlPciInfo_t *pci) {
    BEGIN;
    memset(pci, 0, sizeof *pci);
    pci->bus = 0x10 + index_of(d);
    snprintf(pci->busId, sizeof pci->busId, "00000000:%02X:00.0", pci->bus);
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetConfComputeMemSizeInfo(nvmlDevice_t d, nvmlConfComputeMemSizeInfo_t *info) {
    BEGIN;
    (void)d;
    info->protectedMemSizeKib = 80u << 20;
    info->unprotectedMemSizeKib = 0;
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetNvLinkState(nvmlDevice_t d, unsigned int link, nvmlEnableState_t *active) {
    BEGIN;
    (void)d;
    *active = link < number("links", 0) ? NVML_FEATURE_ENABLED : NVML_FEATURE_DISABLED;
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetGpuFabricInfo(nvmlDevice_t d, nvmlGpuFabricInfo_t *info) {
    BEGIN;
    (void)d;
    memset(info, 0, sizeof *info);
    info->state = (unsigned char)number("fabric", NVML_GPU_FABRIC_STATE_NOT_SUPPORTED);
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetTotalEccErrors(nvmlDevice_t d, nvmlMemoryErrorType_t type, nvmlEccCounterType_t counter, unsigned long long *count) {
    BEGIN;
    (void)d, (void)type, (void)counter;
    *count = number("ecc", 0);
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlSystemGetConfComputeCapabilities(nvmlConfComputeSystemCaps_t *caps) {
    BEGIN;
    caps->cpuCaps = NVML_CC_SYSTEM_CPU_CAPS_INTEL_TDX;
    caps->gpusCaps = number("capable", NVML_CC_SYSTEM_GPUS_CC_CAPABLE);
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlSystemGetConfComputeState(nvmlConfComputeSystemState_t *state) {
    BEGIN;
    state->environment = number("environment", NVML_CC_SYSTEM_ENVIRONMENT_PROD);
    state->ccFeature = number("cc", NVML_CC_SYSTEM_FEATURE_ENABLED);
    state->devToolsMode = number("devtools", NVML_CC_SYSTEM_DEVTOOLS_MODE_OFF);
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlSystemGetConfComputeSettings(nvmlSystemConfComputeSettings_t *settings) {
    BEGIN;
    if (settings->version != nvmlSystemConfComputeSettings_v1) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    settings->environment = number("environment", NVML_CC_SYSTEM_ENVIRONMENT_PROD);
    settings->ccFeature = number("cc", NVML_CC_SYSTEM_FEATURE_ENABLED);
    settings->devToolsMode = number("devtools", NVML_CC_SYSTEM_DEVTOOLS_MODE_OFF);
    settings->multiGpuMode = number("multigpu", NVML_CC_SYSTEM_MULTIGPU_NONE);
    return NVML_SUCCESS;
}
static int ready = -1; // set by a caller; before that the script says

nvmlReturn_t nvmlSystemGetConfComputeGpusReadyState(unsigned int *accepting) {
    BEGIN;
    *accepting = ready >= 0 ? (unsigned)ready : number("ready", NVML_CC_ACCEPTING_CLIENT_REQUESTS_FALSE);
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlSystemSetConfComputeGpusReadyState(unsigned int accepting) {
    BEGIN;
    ready = (int)accepting;
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetConfComputeGpuCertificate(nvmlDevice_t d, nvmlConfComputeGpuCertificate_t *chain) {
    BEGIN;
    char name[32];
    memset(chain, 0, sizeof *chain);
    snprintf(name, sizeof name, "gpu%u.pem", index_of(d));
    chain->attestationCertChainSize = (unsigned)readfile(name, chain->attestationCertChain, sizeof chain->attestationCertChain);
    chain->attestationCertChainSize = number("chainsize", chain->attestationCertChainSize);
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetConfComputeGpuAttestationReport(nvmlDevice_t d, nvmlConfComputeGpuAttestationReport_t *report) {
    BEGIN;
    char name[32];
    uint8_t key[48], *out = report->attestationReport;
    snprintf(name, sizeof name, "gpu%u.key", index_of(d));
    if (readfile(name, key, sizeof key) != sizeof key) return NVML_ERROR_UNKNOWN;
    memcpy(out, "\x11\xe0\x01\xff", 4);
    memcpy(out + 4, report->nonce, 32);
    out[36] = 0;
    snprintf(name, sizeof name, "gpu%u.spdm", index_of(d));
    size_t n = 37 + readfile(name, out + 37, sizeof report->attestationReport - 37 - 96);
    sign(key, out, n, out + n);
    report->attestationReportSize = number("reportsize", (unsigned)n + 96);
    return NVML_SUCCESS;
}
