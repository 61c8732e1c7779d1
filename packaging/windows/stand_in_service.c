/* Stands for shawl.exe where only the installer is tried: a service that runs until it is stopped, or, beside a file
 * named "fails", ends at once. */
#include <windows.h>

static SERVICE_STATUS_HANDLE handle;
static HANDLE stopped;

static void tell(DWORD state, DWORD code) {
    SERVICE_STATUS status = {SERVICE_WIN32_OWN_PROCESS, state, SERVICE_ACCEPT_STOP, code, 0, 0, 0};
    SetServiceStatus(handle, &status);
}

static DWORD WINAPI control(DWORD number, DWORD kind, void *event, void *context) {
    (void)kind, (void)event, (void)context;
    if (number == SERVICE_CONTROL_STOP) SetEvent(stopped);
    return NO_ERROR;
}

static void WINAPI serve(DWORD count, LPWSTR *words) {
    wchar_t path[MAX_PATH + 8];
    (void)count;
    handle = RegisterServiceCtrlHandlerExW(words[0], control, NULL);
    tell(SERVICE_RUNNING, 0);
    GetModuleFileNameW(NULL, path, MAX_PATH);
    wcscpy(wcsrchr(path, L'\\') + 1, L"fails");
    if (GetFileAttributesW(path) == INVALID_FILE_ATTRIBUTES) WaitForSingleObject(stopped, INFINITE);
    tell(SERVICE_STOPPED, GetFileAttributesW(path) == INVALID_FILE_ATTRIBUTES ? 0 : 1);
}

int main(void) {
    wchar_t name[] = L"MedplumAgent";
    SERVICE_TABLE_ENTRYW table[] = {{name, serve}, {NULL, NULL}};
    stopped = CreateEventW(NULL, TRUE, FALSE, NULL);
    return !StartServiceCtrlDispatcherW(table);
}
